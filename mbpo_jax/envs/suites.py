"""Every suite of tasks: its environments and the scripted expert that knows them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mbpo_jax.envs.experts import libero_expert, two_arm_expert
from mbpo_jax.envs.sim import libero, two_arm_lift
from mbpo_jax.envs.sim.simulator import RobosuiteEnv, TaskInfo, check_task

SUITES = {**libero.SUITES, **two_arm_lift.SUITES}  # name -> number of tasks


class _Adapter(NamedTuple):
    task_info: Callable[[str, int], TaskInfo]
    environment: type[RobosuiteEnv]
    plan: Callable[[Any], Iterator[np.ndarray]]


_LIBERO = _Adapter(libero.task_info, libero.LiberoEnv, libero_expert.plan)
_TWO_ARM_LIFT = _Adapter(two_arm_lift.task_info, two_arm_lift.TwoArmLiftEnv, two_arm_expert.plan)
_ADAPTERS = {
    **dict.fromkeys(libero.SUITES, _LIBERO),
    **dict.fromkeys(two_arm_lift.SUITES, _TWO_ARM_LIFT),
}


def task_info(suite: str, task_id: int) -> TaskInfo:
    """Looks a task up. Raises ValueError for a suite or task that does not exist."""
    check_task(SUITES, suite, task_id)
    return _ADAPTERS[suite].task_info(suite, task_id)


def make_env(suite: str, task_id: int, **settings: Any) -> RobosuiteEnv:
    """The environment of a task; `settings` as `RobosuiteEnv`. Raises as `task_info`."""
    check_task(SUITES, suite, task_id)
    return _ADAPTERS[suite].environment(suite, task_id, **settings)


def expert_actions(env: RobosuiteEnv) -> Iterator[np.ndarray]:
    """The actions [A] of the scripted expert from where the episode is now. Raises ValueError for a
    task that it cannot do."""
    return _ADAPTERS[env.suite].plan(env)
