"""LeRobot datasets on disk, codebase versions 2.1 and 3.0: parquet tables, and MP4 or images.

Version 2.1 has a table and a video per episode, version 3.0 many episodes in each; `meta/` says
where. Only JSON, parquet, PNG or JPEG, and MP4 are read. Frames are taken as they are.

Needs pyarrow and av (extra `import`).
"""

import collections
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbpo_jax.data.formats.lerobot_meta import (
    EpisodeMeta,
    entry_name,
    episode_rows,
    find_shared,
    read_episode,
    read_info,
    video_keys,
)
from mbpo_jax.data.formats.recording import (
    HOW_TO_INSTRUCT,
    Entry,
    Names,
    Recording,
    assemble,
    decode_image,
    reading,
    stack,
)

TARGET_ACTIONS = "target_action"  # labels, where they differ from the actions executed
DRAWN = "observation.drawn"  # whether a row has a frame of its own or repeats the one before it

_KEYS = {
    "actions": (("action",), ("actions",)),
    "proprio": (("observation.state",), ("state",)),
    "success": (("next.success",),),
    "reward": (("next.reward",),),
    "target_actions": ((TARGET_ACTIONS,),),
    "drawn": ((DRAWN,),),
}
_CAMERAS = {
    "agentview": (("observation.images.image",), ("image",)),
    "robot0_eye_in_hand": (
        ("observation.images.wrist_image",),
        ("observation.images.image2",),
        ("wrist_image",),
    ),
}
_TIMESTAMP_TOLERANCE = 0.25  # of a step


def entries(source: Path, names: Names) -> list[Entry]:
    """The episodes of a dataset's folder, in the order of `meta/`.

    Raises:
        ValueError: the folder is no such dataset, its `meta/info.json` is corrupt, or it has no
            such cameras or fields.
    """
    if not (source / "meta/info.json").is_file():
        raise ValueError(f"{source} is not a LeRobot dataset: it has no meta/info.json")
    with reading(f"the LeRobot dataset {source} has a damaged meta/"):
        with reading("info.json"):
            info = read_info(source / "meta/info.json")
        rows = list(episode_rows(source, info["codebase_version"]))
    if not rows:
        raise ValueError(f"the LeRobot dataset {source} has no episodes")
    keys = names.find(list(info["features"]), _KEYS, _CAMERAS, "observation.images.")
    videos = video_keys(info, {camera: keys[camera][0] for camera in names.cameras})
    episodes: list[EpisodeMeta] = []
    refused: dict[int, str] = {}
    for i, (where, row) in enumerate(rows):
        try:
            with reading(where):
                episodes.append(read_episode(source, info, videos, where, row))
        except ValueError as error:
            refused[i] = str(error)
    known = [i for i in range(len(rows)) if i not in refused]
    refused |= {known[i]: why for i, why in find_shared(episodes, info["fps"]).items()}
    frames = collections.Counter()  # how many each video should have
    for episode in episodes:
        frames.update({path: episode.length for path, _ in episode.videos.values()})
    complete = len(known) == len(rows) and all(path.is_file() for path in frames)
    if info["codebase_version"] == "v3.0" and not complete:
        frames.clear()  # an episode of which it is unknown may be in any of them
    found = dict(zip(known, episodes, strict=True))

    def read(i):
        if i in refused:
            raise ValueError(refused[i])
        return _read(source, info, keys, found[i], frames, names)

    entry_names = [entry_name(where, row) for where, row in rows]
    twice = {name for name, count in collections.Counter(entry_names).items() if count > 1}
    return [
        Entry(f"{name} ({where})" if name in twice else name, lambda i=i: read(i))
        for i, (name, (where, _)) in enumerate(zip(entry_names, rows, strict=True))
    ]


def _read(
    source: Path,
    info: dict,
    keys: Mapping[str, tuple[str, ...]],
    episode: EpisodeMeta,
    frames_in: Mapping[Path, int],
    names: Names,
) -> Recording:
    features = info["features"]
    columns = ["timestamp", *(k for f, ks in keys.items() if f not in names.cameras for k in ks)]
    columns = list(dict.fromkeys(columns))

    def frames(key, steps):
        if key not in episode.videos:
            with reading(str(episode.table)), reading(key):
                return _images(source, _column(_table(episode, [key]), key), steps)
        path, start = episode.videos[key]
        with reading(str(path)):
            return _video_frames(path, start, info["fps"], steps, frames_in.get(path))

    with reading(str(episode.table)):
        table = _table(episode, columns)
        if len(table) != episode.length:
            raise ValueError(f"it has {len(table)} rows of it, meta/ says {episode.length}")
        if not len(table):
            raise ValueError("it has no rows")
        with reading("timestamp"):
            control_rate = _control_rate(_values(table, "timestamp"), info["fps"])
        return assemble(
            names,
            keys,
            lambda key: _values(table, key),
            lambda: _instruction(episode),
            images={c: lambda steps, key=keys[c][0]: frames(key, steps) for c in names.cameras},
            control_rate=control_rate,
            action_names=_dimension_names(features, keys["actions"]),
            state_names=_dimension_names(features, keys["proprio"]),
        )


def _instruction(episode: EpisodeMeta) -> str:
    tasks = [episode.tasks] if isinstance(episode.tasks, str) else episode.tasks
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(
            f"no instruction: tasks is {tasks!r:.60} in {episode.where}, expected a list of one "
            f"text; {HOW_TO_INSTRUCT}"
        )
    if len(tasks) != 1:
        raise ValueError(
            f"tasks has {len(tasks)} instructions in {episode.where}, expected one; "
            f"{HOW_TO_INSTRUCT}"
        )
    return tasks[0].strip()


def _dimension_names(features: dict, keys: Iterable[str]) -> tuple[str, ...]:
    """The names of the dimensions of some columns, in their order; empty if they have none."""
    names = []
    for key in keys:
        found = features[key].get("names") if isinstance(features[key], dict) else None
        if isinstance(found, dict) and len(found) == 1:  # {"motors": [...]}
            (found,) = found.values()
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            return ()
        names += found
    return tuple(names)


def _table(episode: EpisodeMeta, columns: list[str]) -> pa.Table:
    """The rows of an episode; only the row groups that hold it are read."""
    try:
        absent = {"episode_index", *columns} - set(pq.read_schema(episode.table).names)
        if absent:
            raise ValueError(f"the table has no column {', '.join(sorted(absent))}")
        chosen = [("episode_index", "=", episode.number)]
        return pq.read_table(episode.table, columns=columns, filters=chosen)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"missing, truncated or corrupt: {error}") from error


def _column(table: pa.Table, key: str) -> pa.ChunkedArray:
    column = table[key]
    if column.null_count:
        raise ValueError(f"empty at row {column.is_null().to_pylist().index(True)}")
    return column


def _values(table: pa.Table, key: str) -> np.ndarray:
    """[T, D] of a column of lists of numbers, [T] of any other, of the type they are stored in."""
    column = _column(table, key)
    values = column.to_numpy()
    if values.dtype != object or isinstance(values[0], str | bytes):
        return values
    rows = [np.asarray(row) for row in values]
    for i, row in enumerate(rows):
        if row.dtype.kind not in "biuf" or row.ndim != 1:
            raise ValueError(f"{values[i]!r:.60} at row {i} of {column.type}, expected numbers")
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        odd = next(i for i, row in enumerate(rows) if len(row) != len(rows[0]))
        raise ValueError(f"rows of different sizes: {widths}, first at row {odd}")
    return np.stack(rows)


def _control_rate(timestamps: np.ndarray, fps: float) -> float:
    """The rate of a recording's clock, which is `fps` unless the recording contradicts it."""
    if timestamps.dtype.kind not in "iuf" or timestamps.size != len(timestamps):
        raise ValueError(
            f"it has shape {timestamps.shape} and type {timestamps.dtype}, expected seconds"
        )
    timestamps = timestamps.ravel().astype(np.float64)
    if not np.isfinite(timestamps).all():
        raise ValueError(f"not finite at row {np.flatnonzero(~np.isfinite(timestamps))[0]}")
    gaps = np.diff(timestamps)
    if not len(gaps):
        return float(fps)
    if gaps.min() <= 0:
        raise ValueError(f"its time stamps do not increase at row {np.argmax(gaps <= 0) + 1}")
    step = float(np.median(gaps))
    if np.abs(gaps - step).max() > _TIMESTAMP_TOLERANCE * step:
        raise ValueError(
            f"its time stamps are uneven: {gaps.min():.4f} to {gaps.max():.4f} s apart"
        )
    return float(fps) if math.isclose(step * fps, 1, rel_tol=0.01) else round(1 / step, 2)


def _images(source: Path, column: pa.ChunkedArray, steps: np.ndarray) -> np.ndarray:
    frames = []
    for step, cell in zip(steps, column.take(steps), strict=True):
        with reading(f"row {step}"):
            image = cell.as_py()
            data, path = (
                (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (0, 0)
            )
            if not isinstance(data, bytes | None) or not isinstance(path, str | None):
                raise ValueError(f"a {column.type}, expected bytes or a path of an encoded image")
            if not data and not path:
                raise ValueError("empty: neither bytes nor a path of an image")
            try:
                data = data or (source / path).read_bytes()
            except OSError as error:
                raise ValueError(f"an image file cannot be read: {error}") from error
            frames.append(decode_image(data))
    return stack(frames, steps)


def _video_frames(
    path: Path, start: float, fps: float, steps: np.ndarray, expected: int | None
) -> np.ndarray:
    """The frames shown `steps / fps` seconds after `start`; decoded from there on, in order.
    `expected` is how many the file should have, if that is known."""
    wanted, frames = set(steps.tolist()), {}
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            if expected is not None and stream.frames > expected:  # 0 where the file does not say
                raise ValueError(
                    f"it has {stream.frames} frames, the episodes in it have {expected} rows"
                )
            container.seek(int(start / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                step = round((frame.time - start) * fps)
                if step in wanted:
                    frames[step] = frame.to_ndarray(format="rgb24")
                if step >= steps[-1]:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"missing, truncated or corrupt: {error}") from error
    missing = sorted(wanted - frames.keys())
    if missing:
        raise ValueError(f"truncated: {len(missing)} frames are missing, first {missing[0]}")
    return stack([frames[step] for step in steps.tolist()], steps)
