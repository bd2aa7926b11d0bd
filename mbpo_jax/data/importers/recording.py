"""A full-rate recording of anyone's format: its fields, what is wrong with it, and the project's
episode that it becomes.

Each format is a module with a function `entries(source, names)`, which lists a source's recordings
without reading them. Reading one raises ValueError for whatever is wrong with its file.

Every recording pairs T observations with the T actions sent from them, so the last observation is
the episode's end and its length is T - 1 steps; the action sent from there is not counted.
"""

import dataclasses
import io
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mbpo_jax.episode import Episode, action_windows, strided_timesteps

# The alternatives under which a format's datasets keep a field; the keys of one are concatenated.
Keys = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Recording:
    """T observations and actions; the frames stay in their file until they are asked for."""

    instruction: str
    actions: np.ndarray  # [T, A], as executed
    proprio: np.ndarray  # [T, P]
    images: Mapping[str, Callable[[np.ndarray], np.ndarray]]  # camera -> (steps [F] -> frames)
    success: bool | None  # None where the source does not say
    control_rate: float | None  # Hz; None where the source does not say
    target_actions: np.ndarray | None = None  # [T, A] labels, where they differ from `actions`
    drawn: np.ndarray | None = None  # the steps that have a frame of their own; None: all


@dataclasses.dataclass(frozen=True)
class Entry:
    """A recording that may be read: `name` is unique in its source."""

    name: str
    read: Callable[[], Recording]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a run's config asks of an episode."""

    suite: str
    cameras: tuple[str, ...]
    image_size: int
    chunk: int
    action_dim: int
    render_every: int


@dataclasses.dataclass
class Facts:
    """What there is to tell of one entry, as plain values for JSON."""

    name: str
    problems: list[str] = dataclasses.field(default_factory=list)
    left_out: str = ""  # why an episode without problems is not wanted
    instruction: str = ""
    length: int = 0
    frames: int = 0
    success: bool | None = None
    control_rate: float | None = None
    proprio_dim: int = 0
    action_low: list[float] = dataclasses.field(default_factory=list)
    action_high: list[float] = dataclasses.field(default_factory=list)
    camera_sizes: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # (H, W)

    @property
    def kept(self) -> bool:
        return not self.problems and not self.left_out


class Names:
    """Which keys of a source hold the cameras and fields of an episode.

    Args:
        cameras: the cameras to be found.
        renames: source key -> field or camera. A field named here is looked for nowhere else;
            several keys of one field are concatenated in their order.
    """

    def __init__(self, cameras: Iterable[str], renames: Mapping[str, str]):
        self.cameras = tuple(cameras)
        self._renamed: dict[str, tuple[str, ...]] = {}
        for key, field in renames.items():
            self._renamed[field] = (*self._renamed.get(field, ()), key)

    def find(
        self,
        available: Collection[str],
        required: Mapping[str, Keys],
        optional: Mapping[str, Keys],
        camera_keys: Mapping[str, Keys],
        camera_prefix: str,
    ) -> dict[str, tuple[str, ...]]:
        """The keys of every field and camera, by its name in an episode.

        A camera is also found under its own name, with or without `camera_prefix`.

        Raises:
            ValueError: naming all required fields and cameras that are missing.
        """
        cameras = {
            camera: (*camera_keys.get(camera, ()), (camera_prefix + camera,), (camera,))
            for camera in self.cameras
        }
        found, missing = {}, []
        for field, keys in {**required, **optional, **cameras}.items():
            choices = (self._renamed[field],) if field in self._renamed else keys
            here = [choice for choice in choices if all(key in available for key in choice)]
            if here:
                found[field] = here[0]
            elif field not in optional or field in self._renamed:
                looked = " or ".join(" + ".join(choice) for choice in choices)
                kind = "camera" if field in cameras else "field"
                missing.append(f"no {kind} {field!r} (looked for {looked})")
        if missing:
            raise ValueError(
                f"{'; '.join(missing)}; there are {', '.join(sorted(available))}. "
                "--map=KEY=NAME says which key it is"
            )
        return found


def join(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """[T, D] of the columns [T, D_i] that make one field, by their keys.

    Raises:
        ValueError: they have different numbers of rows.
    """
    if len({len(column) for column in columns.values()}) > 1:
        rows = ", ".join(f"{key} has {len(column)}" for key, column in columns.items())
        raise ValueError(f"different numbers of rows: {rows}")
    return np.concatenate(list(columns.values()), axis=-1)


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of an encoded image.

    Raises:
        ValueError: the image is corrupt, or not 8-bit RGB.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"an image is corrupt: {error}") from error
    if image.mode != "RGB":
        raise ValueError(f"an image has mode {image.mode}, expected 8-bit RGB")
    return np.asarray(image)


def convert(name: str, recording: Recording, layout: Layout) -> tuple[Facts, Episode | None]:
    """What is in a recording, with every problem of it, and its episode if there is none.

    Frames are taken every `render_every` steps and at the last steps, fitted into the layout's
    square with black bars where they are not square themselves. Recordings without a success
    label count as successes. `task_id` is left at -1.
    """
    facts = describe(name, recording)
    problems = facts.problems
    problems += _array_problems("actions", recording.actions)
    problems += _array_problems("proprio", recording.proprio)
    if recording.target_actions is not None:
        problems += _array_problems("target_actions", recording.target_actions)
        if recording.target_actions.shape != recording.actions.shape:
            problems.append("target_actions and actions have different shapes")
    if not recording.instruction:
        problems.append("the instruction is empty")
    if recording.actions.ndim == 2 and recording.actions.shape[1] != layout.action_dim:
        problems.append(
            f"actions have {recording.actions.shape[1]} dimensions, the config has "
            f"action_dim = {layout.action_dim}"
        )
    if len(recording.proprio) != len(recording.actions):
        problems.append(
            f"{len(recording.actions)} actions, but {len(recording.proprio)} rows of proprio"
        )
    if facts.length < layout.chunk:
        problems.append(f"{facts.length} steps are shorter than a chunk of {layout.chunk}")
    if facts.length < 1:
        return facts, None
    steps = recording.drawn
    if steps is None:
        steps = strided_timesteps(facts.length, layout.render_every, offset=0)
    facts.frames = len(steps)
    images = {}
    for camera in layout.cameras:
        try:
            frames = recording.images[camera](steps)
            _check_frames(frames, len(steps))
        except ValueError as error:
            problems.append(f"camera {camera!r}: {error}")
            continue
        facts.camera_sizes[camera] = list(frames.shape[1:3])
        images[camera] = _fit(frames, layout.image_size)
    if problems:
        return facts, None
    labels = recording.actions if recording.target_actions is None else recording.target_actions
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
        actions=action_windows(recording.actions, steps, layout.chunk),
        target_actions=action_windows(labels, steps, layout.chunk),
        num_actions=np.minimum(layout.chunk, facts.length - steps).astype(np.int32),
    )


def describe(name: str, recording: Recording) -> Facts:
    """What a recording says of itself, without reading its frames."""
    actions = recording.actions
    measured = actions.ndim == 2 and actions.dtype.kind == "f" and len(actions) > 0
    return Facts(
        name=name,
        instruction=recording.instruction,
        length=len(actions) - 1,
        success=recording.success,
        control_rate=recording.control_rate,
        proprio_dim=recording.proprio.shape[-1] if recording.proprio.ndim == 2 else 0,
        action_low=actions.min(axis=0).tolist() if measured else [],
        action_high=actions.max(axis=0).tolist() if measured else [],
    )


def _array_problems(name: str, values: np.ndarray) -> list[str]:
    if values.dtype.kind != "f":
        return [f"{name} are {values.dtype}, expected floating point"]
    if values.ndim != 2:
        return [f"{name} have shape {values.shape}, expected (steps, dimensions)"]
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        return [f"{name} are not finite at {len(bad)} steps, first at step {bad[0]}"]
    return []


def _check_frames(frames: np.ndarray, count: int) -> None:
    if frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype}, expected uint8")
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        raise ValueError(f"frames of shape {frames.shape[1:]} have their channels first")
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) != count:
        raise ValueError(f"frames have shape {frames.shape}, expected ({count}, H, W, 3)")


def _fit(frames: np.ndarray, size: int) -> np.ndarray:
    if frames.shape[1:3] == (size, size):
        return frames
    fitted = [
        ImageOps.pad(Image.fromarray(frame), (size, size), Image.Resampling.BILINEAR)
        for frame in frames
    ]
    return np.stack([np.asarray(image) for image in fitted])
