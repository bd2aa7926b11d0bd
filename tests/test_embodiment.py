"""Robots: the shipped ones, and what is wrong with bad ones."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import mbpo_jax
from configs import arx_x5, galaxea_r1, libero_goal, libero_long, libero_panda
from mbpo_jax.episode import Episode
from mbpo_jax.stages.build import robot

ARX = arx_x5.ROBOT


def make_episode(embodiment, **changes):
    frames, chunk = 3, embodiment.chunk
    low, high = np.array(embodiment.action_limits, np.float32).T
    actions = np.broadcast_to((low + high) / 2, (frames, chunk, len(low))).copy()
    fields = {
        "suite": "kitchen",
        "task_id": 0,
        "instruction": "fold the towel",
        "source": "teleoperation",
        "seed": 0,
        "init_state_id": -1,
        "success": True,
        "length": 20,
        "goal_fraction": 1.0,
        "timesteps": np.array([0, 10, 20], np.int32),
        "images": {c: np.zeros((frames, 8, 8, 3), np.uint8) for c in embodiment.cameras},
        "proprio": np.zeros((frames, embodiment.state_dim), np.float32),
        "actions": actions,
        "target_actions": actions,
        "num_actions": np.array([10, 10, 0], np.int32),
    }
    return Episode(**fields | changes)


@pytest.mark.parametrize(
    ("embodiment", "actions", "views"),
    [(libero_panda.ROBOT, 7, 2), (ARX, 14, 3), (galaxea_r1.ROBOT, 21, 3)],
)
def test_shipped_robots(embodiment, actions, views):
    assert embodiment.action_dim == actions
    assert len(embodiment.cameras) == views
    assert embodiment.cameras[0] not in embodiment.wrist_cameras
    assert embodiment.problems(make_episode(embodiment), embodiment.cameras, 8, 10) == []


def test_a_config_takes_its_sizes_from_the_robot():
    config = libero_long.get_config("micro", "any", galaxea_r1.ROBOT)
    assert config.cameras == ("head", "left_wrist", "right_wrist")
    assert (config.action_dim, config.chunk, config.policy.chunk) == (21, 10, 10)
    assert config.policy.action_dim == 21  # padded to the larger of actions and states
    assert config.policy.wrist_cameras == ("left_wrist", "right_wrist")
    assert robot(config) == galaxea_r1.ROBOT
    assert libero_goal.get_config().cameras == ("agentview", "robot0_eye_in_hand")


def test_a_robot_overridden_to_nonsense_is_refused():
    config = libero_long.get_config()
    config.robot.control_hz = 0.0
    with pytest.raises(ValueError, match=r"'libero_panda': control_hz is 0\.0"):
        robot(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": (), "wrist_cameras": ()}, "cameras is empty"),
        ({"cameras": ("head", "head", "left_wrist", "right_wrist")}, "head more than once"),
        ({"states": (*arx_x5.NAMES, "left_joint_1")}, "states has left_joint_1 more than once"),
        ({"wrist_cameras": ("wrist",)}, "wrist_cameras has wrist, not among cameras"),
        ({"grippers": ("gripper",)}, "grippers has gripper, not among actions"),
        ({"deltas": ("base_x",)}, "deltas has base_x, not among actions"),
        ({"action_limits": ((-1.0, 1.0),) * 13}, "13 pairs for 14 actions"),
        ({"action_limits": ((1.0, -1.0),) * 14}, r"left_joint_1 are \(1.0, -1.0\); low < high"),
        ({"action_limits": ((0.0, float("inf")),) * 14}, "low < high is needed"),
        ({"control_hz": float("nan")}, "control_hz is nan"),
        ({"chunk": 0}, "chunk is 0"),
        ({"chunk": 0, "control_hz": 0.0}, "control_hz is 0.0.*; chunk is 0"),
    ],
)
def test_a_bad_robot_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ARX, **changes)


def with_value(shape, index, value):
    array = np.zeros(shape, np.float32)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"head": np.zeros((3, 8, 8, 3), np.uint8)}}, "left_wrist, right_wrist .*head"),
        ({"actions": np.zeros((3, 10, 7), np.float32)}, "7 actions, the robot arx_x5 has 14"),
        ({"proprio": np.zeros((3, 8), np.float32)}, "8 states, the robot arx_x5 has 14"),
        ({"actions": np.zeros((3, 5, 14), np.float32)}, "chunks of 5 steps, 10 are needed"),
        (
            {
                "images": {c: np.zeros((3, 8, 9, 3), np.uint8) for c in ("head",)}
                | {c: np.zeros((3, 8, 8, 3), np.uint8) for c in ARX.wrist_cameras}
            },
            r"frames of head are \(8, 9, 3\), not 8 pixels",
        ),
        ({"instruction": " "}, "the instruction is empty"),
        (
            {"actions": with_value((3, 10, 14), (1, 2, 8), np.nan)},
            "actions that are not finite: right_joint_2",
        ),
        # Degrees instead of radians.
        (
            {"actions": with_value((3, 10, 14), (1, 2, 3), 57.3)},
            "left_joint_4 goes from 0 to 57.3, its limits are -3.14 and 3.14",
        ),
    ],
)
def test_an_episode_of_another_robot_says_what_is_wrong(changes, message):
    problems = ARX.problems(make_episode(ARX, **changes), ARX.cameras, 8, ARX.chunk)
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_no_other_file_knows_a_camera():
    """Only configs and the adapters of simulators and of others' formats name cameras."""
    root = Path(mbpo_jax.__file__).parent
    names = set(libero_panda.ROBOT.cameras) | set(ARX.wrist_cameras)
    found = [
        f"{path.relative_to(root)}: {name}"
        for path in root.rglob("*.py")
        if not {"envs", "formats"} & set(path.relative_to(root).parts)
        for name in names
        if f'"{name}"' in path.read_text(encoding="utf-8")
    ]
    assert found == []
