"""Episodes as a LeRobot dataset of codebase version 3.0, with lossless PNG frames in its tables.

A row is an environment step, and a last row is the observation at the end with the action planned
there. LeRobot wants a frame in every row, but an episode has frames only where they were drawn: the
rows in between repeat the last frame and proprioception, and `observation.drawn` tells the two
apart, so that an import gives the same episodes again. Steps before the first frame, and actions
planned further beyond the end, are left out. Needs pyarrow (extra `import`).
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbpo_jax.data.formats.lerobot import DRAWN, TARGET_ACTIONS
from mbpo_jax.data.formats.recording import encode_image
from mbpo_jax.episode import Episode

FILE_BYTES = 100 * 2**20  # a table that has reached this size is the last of its file
_FILES_PER_CHUNK = 1000
_PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def export_lerobot(directory: Path, episodes: Iterable[Episode], control_rate: int) -> int:
    """Writes `directory`, one episode in memory at a time; returns how many were written.

    `directory` appears when it is complete. `control_rate` is in Hz: environment steps a second.

    Raises:
        ValueError: the directory exists, there are no episodes, they differ in what a LeRobot
            dataset has only once, or an episode has steps that belong to none of its chunks.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"{directory} already exists: delete it first, or choose another target")
    unfinished = directory.parent / f".{directory.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "meta").mkdir(parents=True)
    try:
        with _Writer(unfinished, control_rate) as writer:
            for number, episode in enumerate(episodes):
                writer.add(number, episode)
        if not writer.rows:
            raise ValueError(f"no episodes to write to {directory}")
        writer.write_meta()
        os.rename(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(writer.rows)


class _Writer:
    """The tables of one dataset, and what its `meta/` will say of them."""

    def __init__(self, root: Path, control_rate: int):
        self.root, self.control_rate = root, control_rate
        self.rows: list[dict] = []  # of meta/episodes
        self._tasks: dict[str, int] = {}
        self._features: dict[str, dict] = {}
        self._stats: dict[str, _Stats] = {}
        self._table: pq.ParquetWriter | None = None
        self._path = root
        self._files = 0
        self._num_frames = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error) -> None:
        if self._table is not None:
            self._table.close()

    def add(self, number: int, episode: Episode) -> None:
        columns, frames = _columns(number, episode)
        count = len(columns["action"])
        task = self._tasks.setdefault(episode.instruction, len(self._tasks))
        step = np.arange(count)
        columns |= {
            "timestamp": (step / self.control_rate).astype(np.float32),
            "frame_index": step,
            "episode_index": np.full(count, number),
            "index": self._num_frames + step,
            "task_index": np.full(count, task),
        }
        features = _features(columns, frames)
        if self._features and features != self._features:
            raise ValueError(
                f"episode {number} has other cameras or sizes than the episodes before it: "
                f"{features}, expected {self._features}"
            )
        self._features = features
        for key, values in columns.items():
            values = values.reshape(count, -1).astype(np.float64)
            self._stats.setdefault(key, _Stats()).add(values)
        for key, images in frames.items():
            self._stats.setdefault(key, _Stats()).add(images.reshape(-1, 3) / 255)
        self._write_table(pa.table({**_arrays(columns), **_images(frames, columns[DRAWN])}))
        self.rows.append(
            {
                "episode_index": number,
                "tasks": [episode.instruction],
                "length": count,
                "data/chunk_index": (self._files - 1) // _FILES_PER_CHUNK,
                "data/file_index": (self._files - 1) % _FILES_PER_CHUNK,
                "dataset_from_index": self._num_frames,
                "dataset_to_index": self._num_frames + count,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._num_frames += count

    def _write_table(self, table: pa.Table) -> None:
        if self._table is not None and self._path.stat().st_size >= FILE_BYTES:
            self._table.close()
            self._table = None
        if self._table is None:
            chunk, file = divmod(self._files, _FILES_PER_CHUNK)
            self._path = self.root / "data" / _PLACE.format(chunk_index=chunk, file_index=file)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Repeated frames are stored once as long as the dictionary is not full.
            self._table = pq.ParquetWriter(
                self._path, table.schema, dictionary_pagesize_limit=FILE_BYTES
            )
            self._files += 1
        self._table.write_table(table)

    def write_meta(self) -> None:
        meta = self.root / "meta"
        path = meta / "episodes" / _PLACE.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows), path)
        pq.write_table(_task_table(self._tasks), meta / "tasks.parquet")
        stats = {
            key: s.summary((3, 1, 1) if self._features[key]["dtype"] == "image" else (-1,))
            for key, s in self._stats.items()
        }
        (meta / "stats.json").write_text(json.dumps(stats, indent=1))
        info = {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": len(self.rows),
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": FILE_BYTES // 2**20,
            "video_files_size_in_mb": FILE_BYTES // 2**20,
            "fps": self.control_rate,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": f"data/{_PLACE}",
            "video_path": None,
            "features": self._features,
        }
        (meta / "info.json").write_text(json.dumps(info, indent=1))


class _Stats:
    """Least, largest, mean and standard deviation of rows that come in parts."""

    def __init__(self):
        self._low, self._high, self._sum, self._squares, self._count = np.inf, -np.inf, 0.0, 0.0, 0

    def add(self, rows: np.ndarray) -> None:
        """rows: [N, D]."""
        self._low = np.minimum(self._low, rows.min(axis=0))
        self._high = np.maximum(self._high, rows.max(axis=0))
        self._sum += rows.sum(axis=0)
        self._squares += np.square(rows).sum(axis=0)
        self._count += len(rows)

    def summary(self, shape: tuple[int, ...]) -> dict[str, list]:
        mean = self._sum / self._count
        variance = np.maximum(self._squares / self._count - np.square(mean), 0)
        values = {"min": self._low, "max": self._high, "mean": mean, "std": np.sqrt(variance)}
        lists = {name: value.reshape(shape).tolist() for name, value in values.items()}
        return {**lists, "count": [self._count]}


def _columns(number: int, episode: Episode) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """An episode's numbers at every step [T, ...], and its frames [F, H, W, 3], by LeRobot key."""
    first = int(episode.timesteps[0])
    drawn_at = episode.timesteps - first
    count = episode.length - first + 1
    sent = np.zeros((count, episode.actions.shape[-1]), np.float32)
    labels, known = np.zeros_like(sent), np.zeros(count, np.bool_)
    for f, begin in enumerate(drawn_at):
        end = min(begin + episode.actions.shape[1], count)
        sent[begin:end] = episode.actions[f, : end - begin]
        labels[begin:end] = episode.target_actions[f, : end - begin]
        known[begin : begin + episode.num_actions[f]] = True
    if count < 2 or not known[:-1].all():
        raise ValueError(
            f"episode {number} cannot be written step by step: the action of step "
            f"{first + int(np.argmin(known))} is in none of its chunks"
        )
    drawn = np.isin(np.arange(count), drawn_at)
    last = np.arange(count) == count - 1
    columns = {
        "observation.state": episode.proprio[np.cumsum(drawn) - 1],
        "action": sent,
        TARGET_ACTIONS: labels,
        DRAWN: drawn,
        "next.reward": (last & episode.success).astype(np.float32),
        "next.done": last,
        "next.success": last & episode.success,
    }
    return columns, {f"observation.images.{c}": x for c, x in episode.images.items()}


def _features(columns: dict[str, np.ndarray], frames: dict[str, np.ndarray]) -> dict[str, dict]:
    features = {
        key: {"dtype": values.dtype.name, "shape": list(values.shape[1:]) or [1], "names": None}
        for key, values in columns.items()
    }
    for key, images in frames.items():
        names = ["height", "width", "channels"]
        features[key] = {"dtype": "image", "shape": list(images.shape[1:]), "names": names}
    return features


def _arrays(columns: dict[str, np.ndarray]) -> dict[str, pa.Array]:
    return {
        key: pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
        if values.ndim == 2
        else pa.array(values)
        for key, values in columns.items()
    }


def _images(frames: dict[str, np.ndarray], drawn: np.ndarray) -> dict[str, pa.Array]:
    columns = {}
    for key, images in frames.items():
        encoded = [{"bytes": encode_image(image), "path": None} for image in images]
        columns[key] = pa.array([encoded[i] for i in np.cumsum(drawn) - 1], _IMAGE)
    return columns


def _task_table(tasks: dict[str, int]) -> pa.Table:
    """LeRobot reads the instructions as the index of a pandas frame, which is a matter of schema
    metadata (pandas developer guide, "Storing pandas DataFrame objects in Apache Parquet")."""
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": n, "field_name": n, "pandas_type": p, "numpy_type": k, "metadata": None}
            for n, (p, k) in kinds.items()
        ],
        "pandas_version": "2.2.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
