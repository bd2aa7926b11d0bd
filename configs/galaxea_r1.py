"""Galaxea R1: two arms of six joints with a gripper each, four torso joints and a mobile base (21
dimensions), a head and two wrist cameras.

Joints are absolute targets in radians, grippers run from 0 (closed) to 1 (open); the base is
commanded by velocities in m/s and rad/s. Adapt names, limits and rate to your recordings.
"""

import math

import ml_collections

from configs import real_robot
from mbpo_jax.embodiment import Embodiment

ARM = (*(f"joint_{i}" for i in range(1, 7)), "gripper")
ARMS = (*(f"left_{name}" for name in ARM), *(f"right_{name}" for name in ARM))
TORSO = tuple(f"torso_{i}" for i in range(1, 5))
BASE = ("base_x", "base_y", "base_yaw")
JOINT = (-math.pi, math.pi)

ROBOT = Embodiment(
    name="galaxea_r1",
    cameras=("head", "left_wrist", "right_wrist"),
    wrist_cameras=("left_wrist", "right_wrist"),
    actions=(*ARMS, *TORSO, *BASE),
    action_limits=(*(*(JOINT,) * 6, (0.0, 1.0)) * 2, *(JOINT,) * 4, *((-1.0, 1.0),) * 3),
    grippers=("left_gripper", "right_gripper"),
    deltas=BASE,
    states=(*ARMS, *TORSO, *BASE),
    control_hz=20.0,
    chunk=10,
)


def get_config(variant: str = "micro") -> ml_collections.ConfigDict:
    """The locked config of a variant of `configs/libero_long.py`."""
    return real_robot.get_config(ROBOT, variant)
