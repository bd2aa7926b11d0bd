"""VLA-MBPO on a robot without a simulator, from recorded episodes.

Supervised fine-tuning on demonstrations, world model on these and on the policy's rollouts, policy
optimisation in imagination, imagined success from held-out states, report. Success on the robot is
not measured.

    python -m experiments.real_robot --config=configs/arx_x5.py --stages=demonstrations,sft \
        --config.demonstrations.dataset=DIR
    python -m experiments.real_robot --config=configs/arx_x5.py \
        --config.demonstrations.dataset=DIR --config.rollouts.dataset=DIR

Run the fine-tuned policy on the robot between the two. A robot is a file in configs/.
"""

from experiments.libero_long import run_suite

if __name__ == "__main__":
    run_suite("arx_x5")
