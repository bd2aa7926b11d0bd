"""Every suite of tasks: its environments and the scripted expert that knows them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mbpo_jax.envs.experts import libero_expert, two_arm_expert
from mbpo_jax.envs.experts.motion import Miss, exactly
from mbpo_jax.envs.sim import libero, libero_suites, two_arm_lift
from mbpo_jax.envs.sim.simulator import (
    ACTIONS_PER_ARM,
    STATES_PER_ARM,
    RobosuiteEnv,
    TaskInfo,
    check_task,
)

SUITES = {**libero_suites.SUITES, **two_arm_lift.SUITES}  # unperturbed; name -> number of tasks


class _Adapter(NamedTuple):
    task_info: Callable[[str, int], TaskInfo]
    environment: type[RobosuiteEnv]
    plan: Callable[[Any, Miss], Iterator[np.ndarray]]
    arms: int
    cameras: tuple[str, ...]


_LIBERO = _Adapter(libero.task_info, libero.LiberoEnv, libero_expert.plan, 1, libero.CAMERAS)
_TWO_ARM_LIFT = _Adapter(
    two_arm_lift.task_info,
    two_arm_lift.TwoArmLiftEnv,
    two_arm_expert.plan,
    2,
    two_arm_lift.CAMERAS,
)


def task_info(suite: str, task_id: int) -> TaskInfo:
    """Looks a task up. Raises ValueError for a suite or task that does not exist or lacks files."""
    check_task(_sizes(suite), suite, task_id)
    return _adapter(suite).task_info(suite, task_id)


def num_tasks(suite: str) -> int:
    """How many tasks a suite has. Raises as `task_info`."""
    sizes = _sizes(suite)
    check_task(sizes, suite, 0)
    return sizes[suite]


def all_suites() -> dict[str, int]:
    """Number of tasks of every suite that has a name: LIBERO's, their perturbations, robosuite's.
    Raises ModuleNotFoundError where the simulator is not installed."""
    return {**SUITES, **libero_suites.sizes()}


def dimensions(suite: str) -> tuple[int, int]:
    """Width of an action and of proprioception in a suite."""
    arms = _adapter(suite).arms
    return arms * ACTIONS_PER_ARM, arms * STATES_PER_ARM


def make_env(suite: str, task_id: int, **settings: Any) -> RobosuiteEnv:
    """The environment of a task; `settings` as `RobosuiteEnv`. Raises as `task_info`."""
    check_task(_sizes(suite), suite, task_id)
    return _adapter(suite).environment(suite, task_id, **settings)


def expert_actions(env: RobosuiteEnv, miss: Miss = exactly) -> Iterator[np.ndarray]:
    """The actions [A] of the scripted expert from where the episode is now. `miss` is called for
    how far [2] (metres, horizontally) it grasps or puts down beside where it means to. Raises
    ValueError for a task that it cannot do."""
    return _adapter(env.suite).plan(env, miss)


def cameras(suite: str) -> tuple[str, ...]:
    """The cameras of a suite, head first."""
    return _adapter(suite).cameras


def unsupported_by_expert(suite: str, task_id: int) -> str:
    """Why the scripted expert cannot do a task, "" if it knows all that the goal asks for. Raises
    as `task_info`."""
    task_info(suite, task_id)
    if suite in two_arm_lift.SUITES:
        return ""
    return libero_expert.unsupported(
        libero_suites.goals(libero_suites.task_files(suite)[task_id].bddl)
    )


def _adapter(suite: str) -> _Adapter:
    return _TWO_ARM_LIFT if suite in two_arm_lift.SUITES else _LIBERO


def _sizes(suite: str) -> dict[str, int]:
    """Number of tasks of the suites among which this one is to be found."""
    if suite in SUITES:
        return SUITES
    if libero_suites.is_folder(suite):
        return {suite: len(libero_suites.task_files(suite))}
    return all_suites()
