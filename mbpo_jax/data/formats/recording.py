"""A full-rate recording of anyone's format: its fields, what is wrong with it, and the project's
episode that it becomes.

Each format is a module with a function `entries(source, names)`, which lists a source's recordings
without reading them. Reading one raises ValueError for whatever is wrong with its file.

Every recording pairs T observations with the T actions sent from them, so the last observation is
the episode's end and its length is T - 1 steps; the action sent from there is not counted.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mbpo_jax.embodiment import Embodiment
from mbpo_jax.episode import Episode, action_windows, strided_timesteps

# The alternatives under which a format's datasets keep a field; the keys of one are concatenated.
Keys = tuple[tuple[str, ...], ...]

_REQUIRED = ("actions", "proprio")
_OPTIONAL = ("instruction", "success", "reward", "target_actions", "drawn")
_JOINED = ("actions", "proprio", "target_actions")  # may be put together from several keys

HOW_TO_INSTRUCT = (
    "--instruction=TEXT gives one to every episode, --map=KEY=instruction says where it is"
)
HOW_TO_LABEL = "--all_successes ignores labels, --map=KEY=success names another"

# How frames of [F, H, W, 3] are turned: the steps along H and W.
ORIENTATIONS = {"as_stored": (1, 1), "rotated": (-1, -1), "flipped": (-1, 1), "mirrored": (1, -1)}


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
    label: str = ""  # the key that said `success`
    notes: tuple[str, ...] = ()  # what is odd and no fault
    orientation: str = "as_stored"  # of ORIENTATIONS: what makes the frames upright
    # The names that the source gives to the dimensions of actions and proprio; empty: none.
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A recording that may be read: `name` is unique in its source."""

    name: str
    read: Callable[[], Recording]


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


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Whatever fails while `place` is read becomes a ValueError that names it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except Exception as error:  # whatever a library makes of what anyone's file holds
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error


class Names:
    """Which keys of a source hold the cameras and fields of an episode.

    Args:
        cameras: the cameras to be found.
        renames: source key -> field or camera. A field named here is looked for nowhere else;
            several keys of actions, proprio or target_actions are concatenated in their order.
        given: values that hold for every episode whatever the source says: an `instruction`, or
            `success` = True.

    Raises:
        ValueError: a rename to what is no field or camera, or that nothing would use.
    """

    def __init__(
        self,
        cameras: Iterable[str],
        renames: Mapping[str, str],
        given: Mapping[str, str | bool] | None = None,
    ):
        self.cameras = tuple(cameras)
        self.given = dict(given or {})
        self._renamed: dict[str, tuple[str, ...]] = {}
        known = (*self.cameras, *_REQUIRED, *_OPTIONAL)
        for key, field in renames.items():
            if field not in known:
                near = get_close_matches(field, known, n=1)
                raise ValueError(
                    f"there is no field or camera {field!r} (asked for by --map={key}={field}; "
                    f"there are {', '.join(known)})"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
            self._renamed[field] = (*self._renamed.get(field, ()), key)
        for field, keys in self._renamed.items():
            if len(keys) > 1 and field not in _JOINED:
                raise ValueError(
                    f"{' and '.join(keys)} are both renamed to {field!r}: one is needed (only "
                    f"{', '.join(_JOINED)} are put together from several)"
                )
        labels = [x for x in ("success", "reward") if x in self._renamed]
        if len(labels) > 1:
            raise ValueError("keys are renamed to 'success' and to 'reward': one label is needed")
        unused = [x for x in ("instruction",) if x in self.given and x in self._renamed]
        unused += labels if "success" in self.given else []
        if unused:
            raise ValueError(
                f"a key is renamed to {unused[0]!r}, which is also given for all episodes "
                "(--instruction or --all_successes): leave one of the two out"
            )
        self._ignored = set(self.given)
        if "success" in self.given or "success" in self._renamed:
            self._ignored.add("reward")
        if "reward" in self._renamed:
            self._ignored.add("success")

    def find(
        self,
        available: Collection[str],
        field_keys: Mapping[str, Keys],
        camera_keys: Mapping[str, Keys],
        camera_prefix: str,
    ) -> dict[str, tuple[str, ...]]:
        """The keys of every camera, of actions and proprio, and of the optional fields there are,
        by its name in an episode.

        A camera is also found under its own name, with or without `camera_prefix`.

        Raises:
            ValueError: naming all required fields and cameras that are missing.
        """
        choices = {
            field: field_keys.get(field, ())
            for field in (*_REQUIRED, *_OPTIONAL)
            if field not in self._ignored
        }
        for camera in self.cameras:
            own_names = ((camera_prefix + camera,), (camera,))
            choices[camera] = (*camera_keys.get(camera, ()), *own_names)
        choices |= {field: (keys,) for field, keys in self._renamed.items()}
        found, missing = {}, []
        for field, alternatives in choices.items():
            here = [keys for keys in alternatives if all(key in available for key in keys)]
            if here:
                found[field] = here[0]
            elif field not in _OPTIONAL or field in self._renamed:
                looked = " or ".join(" + ".join(keys) for keys in alternatives)
                kind = "camera" if field in self.cameras else "field"
                missing.append(f"no {kind} {field!r} (looked for {looked})")
        if missing:
            raise ValueError(
                f"{'; '.join(missing)}; there are {', '.join(sorted(available))}. "
                "--map=KEY=NAME says which key it is"
            )
        return found


def assemble(
    names: Names,
    keys: Mapping[str, tuple[str, ...]],
    read: Callable[[str], np.ndarray],
    instruction: Callable[[], str],
    **known,
) -> Recording:
    """A recording of the columns that were found.

    Whether it is a success is read from the field `success`, or from `reward` where there is no
    `success`: from zeros and ones, a step each or one for all, of which any is 1.

    Args:
        keys: as `Names.find` gives them.
        read: the values [T] or [T, D] of a key, as they are stored.
        instruction: the format's own, asked where none is given or found.
        known: further fields of the recording.

    Raises:
        ValueError: naming the key and the row at fault.
    """

    def column(field):
        columns = {}
        for key in keys[field]:
            with reading(key):
                columns[key] = _numbers(read(key))
        return join(columns)

    actions = column("actions")
    if not len(actions):
        raise ValueError("it has no rows")
    if "instruction" in names.given:
        known["instruction"] = names.given["instruction"]
    elif "instruction" in keys:
        (key,) = keys["instruction"]
        with reading(key):
            known["instruction"] = _text(read(key))
    else:
        known["instruction"] = instruction()
    known["success"] = names.given.get("success")
    label = next((field for field in ("success", "reward") if field in keys), None)
    if label:
        (key,) = keys[label]
        values = column(label)
        with reading(key):
            known["success"], known["notes"] = _judge_label(values, len(actions), key, label)
        known["label"] = key
    if "target_actions" in keys:
        known["target_actions"] = column("target_actions")
    if "drawn" in keys:
        drawn = column("drawn")
        with reading(*keys["drawn"]):
            if drawn.shape != (len(actions), 1):
                raise ValueError(f"it has shape {drawn.shape} for {len(actions)} rows of actions")
        known["drawn"] = np.flatnonzero(drawn)
    return Recording(actions=actions, proprio=column("proprio"), **known)


def _numbers(values: np.ndarray) -> np.ndarray:
    """[T, D] of a column of numbers, of the type they are stored in."""
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        kind = type(values.flat[0]).__name__ if values.dtype == object else values.dtype.name
        raise ValueError(f"it holds values of type {kind}, expected numbers")
    if values.ndim > 2:
        raise ValueError(f"it has shape {values.shape}, expected (steps, dimensions)")
    if values.ndim < 2:
        values = values.reshape(-1, 1)
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
    if len(bad):
        raise ValueError(f"not finite at {len(bad)} rows, first at row {bad[0]}")
    return values


def _text(values: np.ndarray) -> str:
    """The one text that a column repeats."""
    texts = set()
    for row, value in enumerate(np.asarray(values).ravel().tolist()):
        if not isinstance(value, str | bytes):
            raise ValueError(f"{type(value).__name__} at row {row}, expected a text")
        try:
            texts.add(value if isinstance(value, str) else value.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"no UTF-8 text at row {row}") from error
    if len(texts) > 1:
        raise ValueError(f"the instruction changes within the episode: {sorted(texts)}")
    return texts.pop().strip() if texts else ""


def _judge_label(
    values: np.ndarray, steps: int, key: str, field: str
) -> tuple[bool, tuple[str, ...]]:
    """Whether a label [T, 1] says success, and what is odd about it."""
    if values.shape not in ((steps, 1), (1, 1)):
        raise ValueError(f"it has shape {values.shape}, expected a label for each of {steps} steps")
    values = values[:, 0]
    other = np.flatnonzero((values != 0) & (values != 1))
    if len(other):
        raise ValueError(
            f"it is {values[other[0]]:g} at row {other[0]}, and a label of success is 0 or 1 (is "
            f"it a dense reward?): {HOW_TO_LABEL}"
        )
    ones = np.flatnonzero(values)
    if not len(ones):
        return False, ()
    zeros = np.flatnonzero(values[ones[0] :] == 0)
    if len(zeros):
        later = ones[0] + zeros[0]
        return True, (f"{key} is 1 at row {ones[0]} and 0 again at row {later} of {steps}",)
    if field == "reward" and len(ones) == steps > 1:
        return True, (f"{key} is 1 at every row: is it no label? {HOW_TO_LABEL}",)
    return True, ()


def join(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """[T, D] of the columns [T, D_i] that make one field, by their keys.

    Raises:
        ValueError: they have different numbers of rows.
    """
    if len({len(column) for column in columns.values()}) > 1:
        rows = ", ".join(f"{key} has {len(column)}" for key, column in columns.items())
        raise ValueError(f"different numbers of rows: {rows}")
    return np.concatenate(list(columns.values()), axis=-1)


def stack(frames: Sequence[np.ndarray], steps: np.ndarray) -> np.ndarray:
    """[F, ...] of the frames at `steps` [F].

    Raises:
        ValueError: they have different shapes.
    """
    for step, frame in zip(steps, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise ValueError(
                f"frames of different shapes: {frames[0].shape} at row {steps[0]}, "
                f"{frame.shape} at row {step}"
            )
    return np.stack(frames)


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of an encoded image.

    Raises:
        ValueError: the image is corrupt, or not 8-bit RGB.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError("an image is corrupt, or of an unknown format") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"an image is corrupt: {error}") from error
    if image.mode != "RGB":
        raise ValueError(f"an image has mode {image.mode}, expected 8-bit RGB")
    return np.asarray(image)


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
