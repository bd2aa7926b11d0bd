"""A task on robosuite's simulator as a chunked environment with several cameras.

What LIBERO and robosuite's own tasks share: the episode, its state, its frames. Nothing is imported
from the simulator here; that happens when the first environment is made.
"""

import abc
import contextlib
import copy
import difflib
import importlib
import logging
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim import rendering
from mbpo_jax.envs.sim.culling import FrustumCulling
from mbpo_jax.envs.sim.level_of_detail import LevelOfDetail

MUJOCO_VERSION = "3.3.7"

_SETTLING_STEPS = 10  # LIBERO's evaluation protocol: the objects fall onto the table first
_NOOP = np.array([0, 0, 0, 0, 0, 0, -1], np.float64)  # an arm stands still and opens its gripper
ACTIONS_PER_ARM = len(_NOOP)
STATES_PER_ARM = 8
# Jitter on an expert's actions: less on rotations, none on the gripper.
_JITTER_SCALE = np.array([1, 1, 1, 0.3, 0.3, 0.3, 0])
# Frames up to this size are drawn with less detail, at three times their size, and averaged; in
# full it is twice their size with four samples a pixel. Larger frames are always drawn in full.
SMALL_FRAME = 128


class TaskInfo(NamedTuple):
    """What is known of a task without a simulator. `num_init_states` fixed initial states are kept
    for evaluation."""

    name: str
    instruction: str
    num_init_states: int


class Arm(NamedTuple):
    """Where one arm is found in MuJoCo's arrays: the site between its fingertips, its hand's body
    and the addresses of its fingers in qpos."""

    site: int
    hand_body: int
    finger_joints: list[int]


class RobosuiteEnv(abc.ABC):
    """One task of one or more Pandas.

    An action is float [7 per arm]: end-effector translation (1.0 = 0.05 m) and rotation
    (1.0 = 0.5 rad) along the world's axes, commanded to the operational-space controller, then the
    gripper (+1 closes). Control runs at 20 Hz. Nothing is rendered by `step`: two small
    frames cost about two steps, large ones more.

    Args:
        simulation: robosuite's environment.
        suite, task_id, info: the task.
        cameras: names of the simulator's cameras, head first.
        image_size: pixels of the square frames.
        chunk: environment steps in an action chunk.
        max_steps: length after which an episode is over.
    """

    def __init__(
        self,
        simulation: Any,
        suite: str,
        task_id: int,
        info: TaskInfo,
        cameras: Sequence[str],
        image_size: int,
        chunk: int,
        max_steps: int,
    ):
        self.simulation = simulation
        self.suite, self.task_id, self.cameras = suite, task_id, tuple(cameras)
        self.image_size, self.chunk, self.max_steps = image_size, chunk, max_steps
        self.instruction, self.num_init_states = info.instruction, info.num_init_states
        # Observables are recomputed 25 times a step, and all we need is read from the state.
        for observable in simulation._observables.values():
            observable.set_enabled(False)
            observable.set_active(False)
        known = simulation.sim.model.camera_names
        for camera in self.cameras:
            if camera not in known:
                raise ValueError(f"no camera {camera!r} in {suite}; there are {', '.join(known)}")
        self.culling = FrustumCulling(self.model, self.data)
        self.detail = LevelOfDetail(self.model)
        self.arms = [
            Arm(
                robot.eef_site_id,
                simulation.sim.model.body_name2id(robot.robot_model.eef_name),
                list(robot._ref_gripper_joint_pos_indexes),
            )
            for robot in simulation.robots
        ]
        self.action_dim = ACTIONS_PER_ARM * len(self.arms)
        self.jitter_scale = np.tile(_JITTER_SCALE, len(self.arms))
        self._reached = np.zeros(len(self._goals_now()), bool)
        self.num_steps, self.success, self.until_end = 0, False, False

    @abc.abstractmethod
    def _restart(self, seed: int | None, init_state_id: int | None) -> None:
        """Resets the simulation to a random state or a fixed one; exactly one is not None."""

    @abc.abstractmethod
    def _goals_now(self) -> np.ndarray:
        """bool [G]: which parts of the goal are true now; the task is done when all are."""

    @abc.abstractmethod
    def _upright(self, frame: np.ndarray) -> np.ndarray:
        """OpenGL's frame, whose rows go up, as the project's images are."""

    def _show_state(self) -> None:  # noqa: B027 - most tasks have nothing of the kind
        """Brings up to date what shows the state without being part of it."""

    @property
    def model(self) -> Any:
        """The mujoco.MjModel."""
        return self.simulation.sim.model._model

    @property
    def data(self) -> Any:
        """The mujoco.MjData."""
        return self.simulation.sim.data._data

    def reset(self, seed: int | None = None, init_state_id: int | None = None) -> None:
        """Starts an episode: a random reset drawn from `seed`, or a fixed initial state.

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
        self._restart(seed, init_state_id)
        for robot in self.simulation.robots:
            # robosuite's gripper integrates its commands and remembers them across resets.
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        for _ in range(_SETTLING_STEPS):
            self.simulation.step(np.tile(_NOOP, len(self.arms)))
        self._refresh_poses()
        self._reached[:] = False
        self.num_steps, self.success = 0, False

    def reset_to(self, request: EpisodeRequest) -> None:
        """`reset` to where the request wants the episode to start; it is over when the request
        says."""
        self.max_steps, self.until_end = request.max_steps, request.until_end
        if request.init_state_id >= 0:
            self.reset(init_state_id=request.init_state_id)
        else:
            self.reset(seed=request.seed)

    def step(self, action: np.ndarray) -> bool:
        """Executes one action [A] and says whether the task is done. Raises ValueError for an
        action of another shape or with values that are not finite."""
        action = np.asarray(action, np.float64)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {self.action_dim} finite numbers, not {action}")
        self.simulation.step(action)
        self.num_steps += 1
        now = self._goals_now()
        self._reached |= now
        self.success = bool(now.all())
        self._refresh_poses()
        return self.success

    @property
    def over(self) -> bool:
        """Whether the episode has ended, by success (unless it goes on `until_end`) or by
        length."""
        return (self.success and not self.until_end) or self.num_steps >= self.max_steps

    @property
    def goal_fraction(self) -> float:
        """Share of the goal's parts that have been true at any time of the episode."""
        return float(self._reached.mean())

    def proprio(self) -> np.ndarray:
        """float32 [8 per arm]: end-effector position (m), orientation as axis-angle (rad), fingers
        (m)."""
        import robosuite.utils.transform_utils as transforms

        parts = []
        for arm in self.arms:
            quaternion = np.roll(self.data.xquat[arm.hand_body], -1)  # wxyz to xyzw
            parts += [
                self.data.site_xpos[arm.site],
                transforms.quat2axisangle(quaternion),
                self.data.qpos[arm.finger_joints],
            ]
        return np.concatenate(parts).astype(np.float32)

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

    def snapshot(self) -> Any:
        """All that decides what happens next, for `restore` in this episode: MuJoCo's state with
        the solver's warm start, and the numbers and arrays that robosuite's objects hold."""
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.model, self.data, physics, kind)
        held = [
            {name: copy.deepcopy(x) for name, x in vars(holder).items() if _is_data(x)}
            for holder in self._holders()
        ]
        return physics, held, self._reached.copy(), self.num_steps, self.success

    def restore(self, snapshot: Any) -> None:
        """Goes back to a `snapshot` of this episode."""
        import mujoco

        physics, held, reached, self.num_steps, self.success = snapshot
        self._reached[:] = reached
        # What is computed from the state must be there too: controllers read it before a step.
        mujoco.mj_setState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        for holder, data in zip(self._holders(), held):
            vars(holder).update(copy.deepcopy(data))
        self._refresh_poses()

    def _holders(self) -> list[Any]:
        """robosuite's objects that remember something from one step to the next."""
        robots = self.simulation.robots
        return [
            self.simulation,
            *robots,
            *(robot.controller for robot in robots),
            *(robot.gripper for robot in robots),
        ]

    def close(self) -> None:
        """Frees the simulator and its renderer."""
        self._make_current()  # freed in another environment's context, it would free that one's
        self.simulation.close()

    def _make_current(self) -> None:
        # OpenGL draws into whichever context came last: with two environments, someone else's.
        self.simulation.sim._render_context_offscreen.gl_ctx.make_current()

    def _refresh_poses(self) -> None:
        # A MuJoCo step leaves body poses one substep behind the state. Kinematics alone catch up:
        # a full forward pass would also change the solver's warm start, and thus the episode.
        import mujoco

        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def _render(self, size: int) -> dict[str, np.ndarray]:
        self._make_current()
        self._show_state()
        self.detail.apply(self.simulation.sim._render_context_offscreen, size <= SMALL_FRAME)
        return {camera: self._frame(camera, size) for camera in self.cameras}

    def _frame(self, camera: str, size: int) -> np.ndarray:
        import cv2

        factor = 1 if size > SMALL_FRAME else 3 if self.detail.enabled else 2
        sim = self.simulation.sim
        with self.culling.view_of(sim.model.camera_name2id(camera)):
            frame = sim.render(camera_name=camera, width=size * factor, height=size * factor)
        frame = self._upright(frame)
        if factor == 1:
            return np.ascontiguousarray(frame)
        return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)


def _is_data(x: Any) -> bool:
    return x is None or isinstance(x, (bool, int, float, np.ndarray, np.generic))


@contextlib.contextmanager
def numpy_seeded(seed: int | Sequence[int]) -> Iterator[None]:
    """NumPy's global generator, from which robosuite draws, seeded here and untouched outside."""
    outside = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(outside)  # noqa: NPY002


def check_task(suites: Mapping[str, int], suite: str, task_id: int) -> None:
    """Raises ValueError for a suite that is not in `suites` or a task beyond its number of them."""
    if suite not in suites:
        near = difflib.get_close_matches(suite, suites, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        names = ", ".join([*suites][:8]) + (f" and {len(suites) - 8} more" * (len(suites) > 8))
        raise ValueError(f"no suite {suite!r}; {hint}There are {names}")
    if not 0 <= task_id < suites[suite]:
        raise ValueError(f"{suite} has the tasks 0 to {suites[suite] - 1}; there is no {task_id}")


def check_mujoco_version(version: str) -> None:
    """Raises RuntimeError unless `version` is the one that simulates LIBERO's scenes correctly."""
    if version != MUJOCO_VERSION:
        raise RuntimeError(
            f"mujoco {version} is installed, LIBERO needs {MUJOCO_VERSION}: newer ones crash or "
            "throw the objects into the air while they settle, older ones draw collision shapes; "
            f"`pip install mujoco=={MUJOCO_VERSION}` mends it"
        )


def prepare_robosuite() -> None:
    """Chooses an OpenGL that works and checks and quietens what robosuite imports; call it before
    the first import of robosuite.

    Raises:
        ModuleNotFoundError: the simulator is not installed.
        RuntimeError: no OpenGL, or another version of mujoco than was tested.
    """
    rendering.select_backend()
    try:
        mujoco = importlib.import_module("mujoco")
        check_mujoco_version(mujoco.__version__)
        _import_robosuite()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the simulator is not installed ({error}); `pip install -e '.[libero]'` installs it"
        ) from error


def _import_robosuite() -> None:
    if "robosuite" not in sys.modules:
        # robosuite logs to a fixed file under /tmp, which another user may own, and warns about
        # missing private macros. These are the macros.
        macros = types.ModuleType("robosuite.macros_private")
        macros.FILE_LOGGING_LEVEL = None
        macros.CONSOLE_LOGGING_LEVEL = "ERROR"
        sys.modules["robosuite.macros_private"] = macros
        # It demands that MUJOCO_EGL_DEVICE_ID, a number of EGL's, is one of CUDA's, too.
        visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        try:
            importlib.import_module("robosuite.utils.binding_utils")
        finally:
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
