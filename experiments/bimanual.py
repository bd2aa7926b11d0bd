"""VLA-MBPO end to end on two arms that lift a pot (robosuite's TwoArmLift), with three views.

python -m experiments.bimanual
python -m experiments.bimanual --config=configs/bimanual.py:small --workdir=DIR
"""

from experiments.libero_long import run_suite

if __name__ == "__main__":
    run_suite("bimanual")
