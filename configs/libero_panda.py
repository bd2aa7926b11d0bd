"""LIBERO's robot: one Franka Panda under robosuite's operational-space controller, 20 Hz.

An action is the end effector's translation (1 = 0.05 m) and rotation (1 = 0.5 rad) and the
gripper's command (+1 closes).
"""

from mbpo_jax.embodiment import Embodiment

MOTION = ("x", "y", "z", "roll", "pitch", "yaw")
STATE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_1", "finger_2")

ROBOT = Embodiment(
    name="libero_panda",
    cameras=("agentview", "robot0_eye_in_hand"),
    wrist_cameras=("robot0_eye_in_hand",),
    actions=(*MOTION, "gripper"),
    action_limits=((-1.0, 1.0),) * 7,
    grippers=("gripper",),
    deltas=MOTION,
    states=STATE,
    control_hz=20.0,
    chunk=10,
)
