"""VLA-MBPO end to end on LIBERO-Goal.

python -m experiments.libero_goal
python -m experiments.libero_goal --config=configs/libero_goal.py:paper --workdir=DIR
"""

from experiments.libero_long import run_suite

if __name__ == "__main__":
    run_suite("libero_goal")
