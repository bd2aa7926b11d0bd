"""VLA-MBPO end to end on LIBERO-Object.

    python -m experiments.libero_object
    python -m experiments.libero_object --config=configs/libero_object.py:paper --workdir=DIR

See `python -m experiments.libero_long --help` for what the flags mean.
"""

from experiments.libero_long import run_suite

if __name__ == "__main__":
    run_suite("libero_object")
