"""`libero_long`'s variant `tiny` with enough episodes and steps to be interrupted in.

python -m experiments.soak
"""

import ml_collections

from configs import libero_long


def get_config() -> ml_collections.ConfigDict:
    """The locked config."""
    config = libero_long.get_config("tiny")
    config.demonstrations.episodes_per_task = 4
    config.rollouts.episodes_per_task = 4
    config.sft.update({"steps": 60, "checkpoint_every": 5})
    config.world_model.training.update({"steps": 30, "checkpoint_every": 5})
    config.rl.updates = 40
    config.evaluation.episodes_per_task = 4
    return config
