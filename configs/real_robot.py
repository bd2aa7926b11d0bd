"""VLA-MBPO on a robot without a simulator: the part of the config that all robots share."""

import ml_collections

from configs import libero_long
from mbpo_jax.embodiment import Embodiment


def get_config(robot: Embodiment, variant: str = "micro") -> ml_collections.ConfigDict:
    """The locked config of a variant of `configs/libero_long.py` for a robot.

    Raises:
        ValueError: an unknown variant.
    """
    c = libero_long.get_config(variant, suite=robot.name, robot=robot)
    libero_long.allow_prompts_of(c, 48)  # instructions are anyone's
    with c.unlocked():
        for simulated in ("max_steps", "workers", "evaluation", "fidelity"):
            del c[simulated]
        c.tasks = ()
        # Datasets of episodes, as `mbpo_jax.data.episodes.write_episodes` leaves them; empty where
        # `experiments.import_data` fills the stage.
        c.demonstrations = ml_collections.ConfigDict()
        c.demonstrations.dataset = ""  # teleoperated successes
        c.demonstrations.render_every = 5  # steps between imported frames; divides chunk
        c.rollouts = ml_collections.ConfigDict({"dataset": ""})  # of the fine-tuned policy
    return c
