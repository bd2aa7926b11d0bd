"""VLA-MBPO on LIBERO-Goal; the variants are those of `configs/libero_long.py`."""

import ml_collections

from configs import libero_long


def get_config(variant: str = "micro") -> ml_collections.ConfigDict:
    """The locked config of a variant; `tiny` and `micro` run task 0."""
    config = libero_long.get_config(variant, suite="libero_goal")
    if variant in ("tiny", "micro"):
        config.tasks = (0,)
    return config
