"""LeRobot datasets on disk, codebase versions 2.1 and 3.0: parquet tables, and MP4 or images.

Version 2.1 has a table and a video per episode, version 3.0 many episodes in each; `meta/` says
where. Only JSON, parquet, PNG or JPEG, and MP4 are read. Frames are taken as they are.

Needs pyarrow and av (extra `import`).
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbpo_jax.data.importers.recording import Entry, Names, Recording, decode_image, join

VERSIONS = ("v2.0", "v2.1", "v3.0")
TARGET_ACTIONS = "target_action"  # labels, where they differ from the actions executed
DRAWN = "observation.drawn"  # whether a row has a frame of its own or repeats the one before it

_REQUIRED = {
    "actions": (("action",), ("actions",)),
    "proprio": (("observation.state",), ("state",)),
}
_OPTIONAL = {
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
    """The episodes of a dataset's folder, by number.

    Raises:
        ValueError: the folder is no such dataset, or its `meta/` is corrupt.
    """
    if not (source / "meta/info.json").is_file():
        raise ValueError(f"{source} is not a LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads((source / "meta/info.json").read_text())
        version = info["codebase_version"]
        if version not in VERSIONS:
            raise ValueError(f"codebase_version is {version}, supported are {', '.join(VERSIONS)}")
        missing = {"fps", "features", "data_path"} - info.keys()
        if missing:
            raise ValueError(f"info.json lacks {', '.join(sorted(missing))}")
        if version == "v3.0":
            tables = sorted((source / "meta/episodes").glob("*/*.parquet"))
            episodes = [row for path in tables for row in _episode_rows(path)]
        else:
            lines = (source / "meta/episodes.jsonl").read_text().splitlines()
            episodes = [_episode_2(json.loads(line), info) for line in lines]
    except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are among these
        raise ValueError(f"the LeRobot dataset {source} has a damaged meta/: {error!r}") from error
    if not episodes:
        raise ValueError(f"the LeRobot dataset {source} has no episodes")
    return [
        Entry(
            f"episode_{episode['episode_index']:06d}",
            lambda episode=episode: _read(source, info, episode, names),
        )
        for episode in episodes
    ]


def _episode_rows(path: Path) -> list[dict]:
    columns = [c for c in pq.read_schema(path).names if not c.startswith("stats/")]
    return pq.read_table(path, columns=columns).to_pylist()


def _episode_2(episode: dict, info: dict) -> dict:
    """An episode of version 2 with the entries by which version 3 finds its files."""
    chunk = episode["episode_index"] // info["chunks_size"]
    place = {"data/chunk_index": chunk}
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            place[f"videos/{key}/chunk_index"] = chunk
            place[f"videos/{key}/from_timestamp"] = 0.0
    return {**episode, **place}


def _path(source: Path, template: str, episode: dict, prefix: str, **fields) -> Path:
    """The file of an episode, by the names that either version's templates use."""
    chunk = episode[f"{prefix}/chunk_index"]
    number = episode["episode_index"]
    file = episode.get(f"{prefix}/file_index")
    places = {"chunk_index": chunk, "episode_chunk": chunk, "file_index": file}
    return source / template.format(**places, episode_index=number, **fields)


def _read(source: Path, info: dict, episode: dict, names: Names) -> Recording:
    features = info["features"]
    keys = names.find(list(features), _REQUIRED, _OPTIONAL, _CAMERAS, "observation.images.")
    path = _path(source, info["data_path"], episode, "data")
    fields = [f for f in keys if f not in names.cameras]
    columns = ["timestamp", *(key for field in fields for key in keys[field])]
    table = _table(path, episode, columns)
    if len(table) != episode["length"]:
        raise ValueError(f"{path} has {len(table)} rows of it, meta/ says {episode['length']}")

    def column(field):
        return join({key: _array(table, key) for key in keys[field]})

    def frames(camera, steps):
        key = keys[camera][0]
        if features[key]["dtype"] != "video":
            return _images(source, _table(path, episode, [key])[key].take(steps))
        video = _path(source, info["video_path"], episode, f"videos/{key}", video_key=key)
        start = episode[f"videos/{key}/from_timestamp"]
        return _video_frames(video, start, info["fps"], steps)

    success = None
    for field in ("reward", "success"):
        if field in keys:
            success = bool((column(field) > 0).any())
    if len(episode["tasks"]) != 1:
        raise ValueError(f"it has {len(episode['tasks'])} instructions, expected one")
    return Recording(
        instruction=episode["tasks"][0].strip(),
        actions=column("actions"),
        proprio=column("proprio"),
        images={c: lambda steps, c=c: frames(c, steps) for c in names.cameras},
        success=success,
        control_rate=_control_rate(table["timestamp"].to_numpy(), info["fps"]),
        target_actions=column("target_actions") if "target_actions" in keys else None,
        drawn=np.flatnonzero(column("drawn")) if "drawn" in keys else None,
    )


def _table(path: Path, episode: dict, columns: list[str]) -> pa.Table:
    """The rows of an episode; only the row groups that hold it are read."""
    try:
        chosen = [("episode_index", "=", episode["episode_index"])]
        return pq.read_table(path, columns=columns, filters=chosen)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is missing, truncated or corrupt: {error}") from error


def _array(table: pa.Table, key: str) -> np.ndarray:
    """[T, D] of a column of numbers or of lists of numbers, of the type they are stored in."""
    rows = table[key].to_numpy()
    if rows.dtype != object:
        return rows[:, None]
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        raise ValueError(f"{key} has rows of different sizes: {widths}")
    return np.stack(rows)


def _control_rate(timestamps: np.ndarray, fps: float) -> float:
    """The rate of a recording's clock, which is `fps` unless the recording contradicts it."""
    gaps = np.diff(timestamps)
    if len(gaps) == 0:
        return float(fps)
    step = float(np.median(gaps))
    if np.abs(gaps - step).max() > _TIMESTAMP_TOLERANCE * abs(step):
        raise ValueError(
            f"its time stamps are uneven: {gaps.min():.4f} to {gaps.max():.4f} s apart"
        )
    return float(fps) if math.isclose(step * fps, 1, rel_tol=0.01) else round(1 / step, 2)


def _images(source: Path, column: Iterable[pa.Scalar]) -> np.ndarray:
    frames = []
    for cell in column:
        image = cell.as_py()
        try:
            data = image["bytes"] or (source / image["path"]).read_bytes()
        except OSError as error:
            raise ValueError(f"an image file cannot be read: {error}") from error
        frames.append(decode_image(data))
    return np.stack(frames)


def _video_frames(path: Path, start: float, fps: float, steps: np.ndarray) -> np.ndarray:
    """The frames shown `steps / fps` seconds after `start`; decoded from there on, in order."""
    wanted, frames = set(steps.tolist()), {}
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            container.seek(int(start / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                step = round((frame.time - start) * fps)
                if step in wanted:
                    frames[step] = frame.to_ndarray(format="rgb24")
                if step >= steps[-1]:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is missing, truncated or corrupt: {error}") from error
    missing = sorted(wanted - frames.keys())
    if missing:
        raise ValueError(
            f"{path} is truncated: {len(missing)} frames are missing, first {missing[0]}"
        )
    return np.stack([frames[step] for step in steps.tolist()])
