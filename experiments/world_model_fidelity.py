"""What the world model gets right on held-out episodes, beside ablations of its parts.

Images (PSNR, SSIM, LPIPS where installed, consistency of the views, motion), reward (accuracy, F1,
calibration), error against the imagined horizon and time, for the trained world model, for copying
the last frame, and for the models of --config.fidelity.ablations, which are trained first.

    python -m experiments.world_model_fidelity
    python -m experiments.world_model_fidelity --workdir=DIR --config.fidelity.ablations="()"

The working directory is that of `experiments.libero_long`; stages missing there are run first.
Writes DIR/fidelity/report.html and done.json.
"""

from experiments.libero_long import run_suite

if __name__ == "__main__":
    run_suite(
        "libero_long",
        default_stages=("demonstrations", "sft", "rollouts", "world_model", "fidelity"),
    )
