"""The project's episode that a recording becomes, and what is wrong with it."""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageOps

from mbpo_jax.data.formats.recording import HOW_TO_INSTRUCT, Recording, reading
from mbpo_jax.embodiment import Embodiment
from mbpo_jax.episode import Episode, action_windows, strided_timesteps

# How frames of [F, H, W, 3] are turned: the steps along H and W.
ORIENTATIONS = {"as_stored": (1, 1), "rotated": (-1, -1), "flipped": (-1, 1), "mirrored": (1, -1)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a run's config asks of an episode, and what is changed on the way."""

    suite: str
    cameras: tuple[str, ...]
    image_size: int
    chunk: int
    render_every: int
    robot: Embodiment
    orientation: str = ""  # of ORIENTATIONS; empty: the recording's
    # (action dimension, low, high): the values in the source that become the dimension's limits.
    ranges: tuple[tuple[str, float, float], ...] = ()


@dataclasses.dataclass
class Facts:
    """What there is to tell of one entry, as plain values for JSON."""

    name: str
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)  # what is odd and no fault
    left_out: str = ""  # why an episode without problems is not wanted
    instruction: str = ""
    length: int = 0
    frames: int = 0
    success: bool | None = None
    label: str = ""  # the key that said `success`
    control_rate: float | None = None
    proprio_dim: int = 0
    action_low: list[float] = dataclasses.field(default_factory=list)
    action_high: list[float] = dataclasses.field(default_factory=list)
    camera_sizes: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # (H, W)
    orientation: str = ""

    @property
    def kept(self) -> bool:
        return not self.problems and not self.left_out


def convert(name: str, recording: Recording, layout: Layout) -> tuple[Facts, Episode | None]:
    """What is in a recording, with every problem of it, and its episode if there is none.

    Frames are taken every `render_every` steps and at the last steps, turned upright, and fitted
    into the layout's square with black bars where they are not square themselves. Recordings
    without a success label count as successes. `task_id` is left at -1.
    """
    actions = _in_limits(recording.actions, layout)
    labels = actions
    if recording.target_actions is not None:
        labels = _in_limits(recording.target_actions, layout)
    recording = dataclasses.replace(recording, actions=actions)
    facts = describe(name, recording)
    facts.orientation = layout.orientation or recording.orientation
    problems = facts.problems
    problems += _problems(recording, labels, layout.robot)
    if facts.length < layout.chunk:
        problems.append(f"{facts.length} steps are shorter than a chunk of {layout.chunk}")
    if facts.length < 1:
        return facts, None
    steps = recording.drawn
    if steps is None:
        steps = strided_timesteps(facts.length, layout.render_every, offset=0)
    elif not len(steps) or steps[-1] != facts.length:
        problems.append(f"its last row, {facts.length}, has no frame of its own")
        return facts, None
    facts.frames = len(steps)
    images = {}
    down, right = ORIENTATIONS[facts.orientation]
    for camera in layout.cameras:
        try:
            with reading(f"camera {camera!r}"):
                frames = recording.images[camera](steps)
                _check_frames(frames, len(steps))
                facts.camera_sizes[camera] = list(frames.shape[1:3])
                images[camera] = _fit(frames[:, ::down, ::right], layout.image_size)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        return facts, None
    success = recording.success is not False
    return facts, Episode(
        suite=layout.suite,
        task_id=-1,
        instruction=recording.instruction,
        source="imported",
        seed=-1,
        init_state_id=-1,
        success=success,
        length=facts.length,
        goal_fraction=float(success),
        timesteps=steps.astype(np.int32),
        images=images,
        proprio=recording.proprio[steps].astype(np.float32),
        actions=action_windows(actions, steps, layout.chunk),
        target_actions=action_windows(labels, steps, layout.chunk),
        num_actions=np.minimum(layout.chunk, facts.length - steps).astype(np.int32),
    )


def describe(name: str, recording: Recording) -> Facts:
    """What a recording says of itself, without reading its frames."""
    actions = recording.actions
    return Facts(
        name=name,
        notes=list(recording.notes),
        instruction=recording.instruction,
        length=len(actions) - 1,
        success=recording.success,
        label=recording.label,
        control_rate=recording.control_rate,
        proprio_dim=recording.proprio.shape[1],
        action_low=actions.min(axis=0).tolist(),
        action_high=actions.max(axis=0).tolist(),
    )


def _in_limits(actions: np.ndarray, layout: Layout) -> np.ndarray:
    """The actions [T, A] with the layout's ranges mapped onto the limits of their dimensions."""
    robot = layout.robot
    if not layout.ranges or actions.shape[1] != robot.action_dim:
        return actions
    actions = actions.astype(np.float32)
    for name, source_low, source_high in layout.ranges:
        i = robot.actions.index(name)
        share = (actions[:, i] - source_low) / (source_high - source_low)
        low, high = robot.action_limits[i]
        actions[:, i] = low + share * (high - low)
    return actions


def _problems(recording: Recording, labels: np.ndarray, robot: Embodiment) -> list[str]:
    """What is wrong with everything but the frames; `labels` [T, A] are the target actions."""
    wrong = []
    if not recording.instruction:
        wrong.append(f"the instruction is empty: {HOW_TO_INSTRUCT}")
    try:
        recording.instruction.encode()
    except UnicodeEncodeError:
        wrong.append(f"the instruction {recording.instruction!r} is no Unicode text")
    actions, proprio = recording.actions, recording.proprio
    columns = {"actions": actions, "proprio": proprio}
    if labels is not actions:
        columns["target_actions"] = labels
    for name, values in columns.items():
        if values.dtype.kind != "f":
            wrong.append(f"{name} are {values.dtype}, expected floating point")
        if len(values) != len(actions):
            wrong.append(f"{len(actions)} actions, but {len(values)} rows of {name}")
    found = robot.array_problems(actions, proprio)
    if labels is not actions:
        found += [x for x in robot.array_problems(labels, proprio) if x not in found]
    wrong += found
    for field, names, expected in (
        ("actions", recording.action_names, robot.actions),
        ("states", recording.state_names, robot.states),
    ):
        if names != expected and sorted(names) == sorted(expected):
            wrong.append(
                f"{field} are in the order {', '.join(names)}; the robot {robot.name} has them as "
                f"{', '.join(expected)}"
            )
    rate, expected_rate = recording.control_rate, robot.control_hz
    if rate is not None and not math.isclose(rate, expected_rate, rel_tol=0.01):
        wrong.append(
            f"recorded at {rate:g} Hz, the robot {robot.name} acts at {expected_rate:g} Hz: "
            f"resample it before, {rate / expected_rate:.3g} rows to one (changes are summed, "
            "targets interpolated), or correct --config.robot.control_hz"
        )
    return wrong


def _check_frames(frames: np.ndarray, count: int) -> None:
    if frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype}, expected uint8")
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        raise ValueError(f"frames of shape {frames.shape[1:]} have their channels first")
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) != count or not frames.size:
        raise ValueError(f"frames have shape {frames.shape}, expected ({count}, H, W, 3)")


def _fit(frames: np.ndarray, size: int) -> np.ndarray:
    if frames.shape[1:3] == (size, size):
        return frames
    fitted = [
        ImageOps.pad(Image.fromarray(frame), (size, size), Image.Resampling.BILINEAR)
        for frame in frames
    ]
    return np.stack([np.asarray(image) for image in fitted])
