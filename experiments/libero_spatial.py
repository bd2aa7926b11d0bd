"""VLA-MBPO end to end on LIBERO-Spatial.

python -m experiments.libero_spatial
python -m experiments.libero_spatial --config=configs/libero_spatial.py:paper --workdir=DIR
"""

from experiments.libero_long import run_suite

if __name__ == "__main__":
    run_suite("libero_spatial")
