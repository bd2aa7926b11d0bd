"""Arx-X5: two arms of six joints with a gripper each (14 dimensions), a head and two wrist cameras.

Joints are absolute targets in radians, grippers run from 0 (closed) to 1 (open). Adapt names,
limits and rate to your recordings.
"""

import math

import ml_collections

from configs import real_robot
from mbpo_jax.embodiment import Embodiment

ARM = (*(f"joint_{i}" for i in range(1, 7)), "gripper")
NAMES = (*(f"left_{name}" for name in ARM), *(f"right_{name}" for name in ARM))

ROBOT = Embodiment(
    name="arx_x5",
    cameras=("head", "left_wrist", "right_wrist"),
    wrist_cameras=("left_wrist", "right_wrist"),
    actions=NAMES,
    action_limits=(*((-math.pi, math.pi),) * 6, (0.0, 1.0)) * 2,
    grippers=("left_gripper", "right_gripper"),
    deltas=(),
    states=NAMES,
    control_hz=20.0,
    chunk=10,
)


def get_config(variant: str = "micro") -> ml_collections.ConfigDict:
    """The locked config of a variant of `configs/libero_long.py`."""
    return real_robot.get_config(ROBOT, variant)
