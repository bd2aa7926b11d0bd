"""VLA-MBPO on two arms: robosuite's TwoArmLift, two Pandas with 14-dimensional actions and three
cameras (head, left wrist, right wrist).

Variants, chosen as `--config=configs/bimanual.py:NAME`, are those of `configs/libero_long.py`;
`micro` runs on 2 CPU cores from scratch, in about half an hour.
"""

import ml_collections

from configs import libero_long
from configs.libero_panda import MOTION, STATE
from mbpo_jax.embodiment import Embodiment

ARMS = ("left", "right")

ROBOT = Embodiment(
    name="two_pandas",
    cameras=("agentview", "robot0_eye_in_hand", "robot1_eye_in_hand"),
    wrist_cameras=("robot0_eye_in_hand", "robot1_eye_in_hand"),
    actions=tuple(f"{arm}_{name}" for arm in ARMS for name in (*MOTION, "gripper")),
    action_limits=((-1.0, 1.0),) * 14,
    grippers=tuple(f"{arm}_gripper" for arm in ARMS),
    deltas=tuple(f"{arm}_{name}" for arm in ARMS for name in MOTION),
    states=tuple(f"{arm}_{name}" for arm in ARMS for name in STATE),
    control_hz=20.0,
    chunk=10,
)


def get_config(variant: str = "micro") -> ml_collections.ConfigDict:
    """The locked config of a variant.

    Raises:
        ValueError: an unknown variant.
    """
    config = libero_long.get_config(variant, suite="two_arm_lift", robot=ROBOT)
    config.tasks = (0,)
    config.max_steps = 150  # the scripted expert needs about 55
    libero_long.allow_prompts_of(config, 24)  # the embedded tokeniser spells words unknown to it
    if variant == "micro":
        _fit_into_half_an_hour(config)
    return config


def _fit_into_half_an_hour(c: ml_collections.ConfigDict) -> None:
    """A third view and a second arm cost time, so there is less of everything than with LIBERO."""
    c.demonstrations.episodes_per_task = 48
    c.sft.steps = 1200
    c.rollouts.episodes_per_task = 30
    c.world_model.training.steps = 600
    c.rl.updates = 45
    c.rl.critic_warmup = 15
    c.evaluation.episodes_per_task = 30
