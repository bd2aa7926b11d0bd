"""VLA-MBPO end to end on LIBERO-Object.

python -m experiments.libero_object
python -m experiments.libero_object --config=configs/libero_object.py:paper --workdir=DIR
"""

from experiments.libero_long import run_suite

if __name__ == "__main__":
    run_suite("libero_object")
