"""A full-rate recording of anyone's format, and how its fields are found.

Each format is a module with a function `entries(source, names)`, which lists a source's recordings
without reading them. Reading one raises ValueError for whatever is wrong with its file.

Every recording pairs T observations with the T actions sent from them, so the last observation is
the episode's end and its length is T - 1 steps; the action sent from there is not counted.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from PIL import Image, UnidentifiedImageError

# The alternatives under which a format's datasets keep a field; the keys of one are concatenated.
Keys = tuple[tuple[str, ...], ...]

_REQUIRED = ("actions", "proprio")
_OPTIONAL = ("instruction", "success", "reward", "target_actions", "drawn")
_JOINED = ("actions", "proprio", "target_actions")  # may be put together from several keys

HOW_TO_INSTRUCT = (
    "--instruction=TEXT gives one to every episode, --map=KEY=instruction says where it is"
)
HOW_TO_LABEL = "--all_successes ignores labels, --map=KEY=success names another"


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
    orientation: str = "as_stored"  # of `conversion.ORIENTATIONS`: what makes them upright
    # The names that the source gives to the dimensions of actions and proprio; empty: none.
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A recording that may be read: `name` is unique in its source."""

    name: str
    read: Callable[[], Recording]


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


def encode_image(image: np.ndarray) -> bytes:
    """A PNG file of an image uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


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
