"""Episodes as a TFDS dataset in the RLDS layout, written and read without TensorFlow.

One RLDS step is one *rendered* frame, so steps are up to a chunk apart: `timestep` says where in
the episode a frame lies and `action` holds the whole chunk sent from there on. Anyone's TFDS opens
the directory with `tfds.builder_from_directory(directory).as_data_source("train")`.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.json_format import ParseError
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetInfoFileError

from mbpo_jax.episode import Episode

_METADATA = (
    "suite",
    "task_id",
    "source",
    "seed",
    "init_state_id",
    "success",
    "length",
    "goal_fraction",
)

# What TFDS, protobuf, Pillow and array_record raise on corrupt content or a lost file.
_CORRUPT = (
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    FileNotFoundError,
    DatasetInfoFileError,
    ParseError,
)


@dataclasses.dataclass(frozen=True)
class EpisodeShapes:
    """What all episodes of one dataset share."""

    image_shapes: dict[str, tuple[int, int, int]]  # camera -> (H, W, 3)
    proprio_dim: int
    chunk: int  # k
    action_dim: int

    @classmethod
    def of(cls, episode: Episode) -> "EpisodeShapes":
        _, chunk, action_dim = episode.actions.shape
        return cls(
            image_shapes={camera: x.shape[1:] for camera, x in episode.images.items()},
            proprio_dim=episode.proprio.shape[-1],
            chunk=chunk,
            action_dim=action_dim,
        )


class RobotEpisodes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder over episodes of one shape that are handed to it."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded, so there is no checksum file beside this one

    def __init__(self, *, episodes: Iterable[Episode], shapes: EpisodeShapes, **kwargs):
        self._episodes = episodes
        self._shapes = shapes
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        shapes = self._shapes
        chunk = tfds.features.Tensor(shape=(shapes.chunk, shapes.action_dim), dtype=np.float32)
        step = {
            "observation": {
                **{
                    camera: tfds.features.Image(shape=shape, encoding_format="png")
                    for camera, shape in shapes.image_shapes.items()
                },
                "proprio": tfds.features.Tensor(shape=(shapes.proprio_dim,), dtype=np.float32),
            },
            "timestep": np.int32,
            "action": chunk,
            "target_action": chunk,
            "num_actions": np.int32,
            "reward": np.float32,
            "discount": np.float32,
            "is_first": np.bool_,
            "is_last": np.bool_,
            "is_terminal": np.bool_,
            "language_instruction": tfds.features.Text(),
        }
        metadata = {
            "suite": tfds.features.Text(),
            "task_id": np.int64,
            "source": tfds.features.Text(),
            "seed": np.int64,
            "init_state_id": np.int64,
            "success": np.bool_,
            "length": np.int64,
            # TFDS stores plain floats in single precision; bytes keep the double exact.
            "goal_fraction": tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes"),
        }
        return self.dataset_info_from_configs(
            description="Robot episodes; a step is a rendered frame with the action chunk sent.",
            features=tfds.features.FeaturesDict(
                {"steps": tfds.features.Dataset(step), "episode_metadata": metadata}
            ),
            disable_shuffling=True,
        )

    def _log_download_bytes(self):
        """Silent: TFDS would announce a download into the temporary directory."""

    def _log_download_done(self):
        """Silent, for the same reason."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, episode in enumerate(self._episodes):
            _check(episode, self._shapes, i)
            metadata = {key: getattr(episode, key) for key in _METADATA}
            yield i, {"steps": list(_steps(episode)), "episode_metadata": metadata}


def write_episodes(directory: str | Path, episodes: Iterable[Episode]) -> int:
    """Writes a dataset, one episode in memory at a time; returns how many were written.

    `directory` appears when the dataset is complete: a stopped write leaves nothing there.

    Raises:
        ValueError: no episodes, an episode whose arrays contradict each other or the first
            episode's shapes, or a directory that is already in use.
        OSError: the disk is full; nothing is left of the dataset.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"{directory} already exists: delete it first to write a new dataset")
    episodes = iter(episodes)
    first = next(episodes, None)
    if first is None:
        raise ValueError(f"no episodes to write to {directory}")
    unfinished = directory.parent / f".{directory.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    tfds.disable_progress_bar()
    try:
        builder = RobotEpisodes(
            episodes=itertools.chain([first], episodes),
            shapes=EpisodeShapes.of(first),
            data_dir=unfinished,
            file_format="array_record",
        )
        builder.download_and_prepare()
        count = builder.info.splits["train"].num_examples
        os.rename(builder.data_dir, directory)
    except RuntimeError as error:  # array_record has no OSError of its own
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return count


def dataset_facts(episodes: Sequence[Episode]) -> dict:
    """How many "episodes" there are, their "mean_length" in environment steps, and all "frames"."""
    return {
        "episodes": len(episodes),
        "mean_length": float(np.mean([e.length for e in episodes])),
        "frames": sum(len(e.timesteps) for e in episodes),
    }


def read_episodes(directory: str | Path) -> list[Episode]:
    """All episodes of a dataset in the order they were written, equal to what was written.

    Raises:
        ValueError: the dataset is missing, corrupt or truncated.
    """
    return list(iterate_episodes(directory))


def iterate_episodes(directory: str | Path) -> Iterator[Episode]:
    """As `read_episodes`, with one episode in memory at a time."""
    directory = Path(directory)
    if not directory.exists():
        raise ValueError(f"no dataset at {directory}: run the stage that writes it")
    files = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if not any(name.endswith(".json") or "array_record" in name for name in files):
        raise ValueError(f"no dataset at {directory}: name the folder `dataset` of a stage")
    with _corruption_of(directory):
        builder = tfds.builder_from_directory(directory)
        split = builder.info.splits["train"]
        shards = list(zip(split.filepaths, split.shard_lengths, strict=True))
    for path, length in shards:
        with _corruption_of(path), ArrayRecordDataSource(os.fspath(path)) as records:
            if len(records) != length:
                raise ValueError(f"{len(records)} records, expected {length}")
            for i in range(length):
                example = builder.info.features.deserialize_example_np(records[i])
                yield _episode(example)


@contextlib.contextmanager
def _corruption_of(path: Path):
    """Names the file, and what to do, in an error about corrupt content."""
    try:
        yield
    except _CORRUPT as error:
        dataset = path if path.is_dir() else path.parent
        raise ValueError(
            f"{path} is corrupt or truncated ({error!r}): delete the directory {dataset} and run "
            "the stage that writes it again"
        ) from error


def _steps(episode: Episode) -> Iterator[dict]:
    frames = len(episode.timesteps)
    for f in range(frames):
        last = f == frames - 1
        terminal = last and episode.success
        yield {
            "observation": {
                **{camera: Image.fromarray(x[f]) for camera, x in episode.images.items()},
                "proprio": episode.proprio[f],
            },
            "timestep": episode.timesteps[f],
            "action": episode.actions[f],
            "target_action": episode.target_actions[f],
            "num_actions": episode.num_actions[f],
            "reward": float(terminal),
            "discount": 1.0 - float(terminal),
            "is_first": f == 0,
            "is_last": last,
            "is_terminal": terminal,
            "language_instruction": episode.instruction,
        }


def _episode(example: dict) -> Episode:
    steps = list(example["steps"])
    metadata = example["episode_metadata"]
    cameras = [key for key in steps[0]["observation"] if key != "proprio"]
    return Episode(
        instruction=steps[0]["language_instruction"].decode(),
        images={c: np.stack([step["observation"][c] for step in steps]) for c in cameras},
        proprio=np.stack([step["observation"]["proprio"] for step in steps]),
        timesteps=np.stack([step["timestep"] for step in steps]),
        actions=np.stack([step["action"] for step in steps]),
        target_actions=np.stack([step["target_action"] for step in steps]),
        num_actions=np.stack([step["num_actions"] for step in steps]),
        suite=metadata["suite"].decode(),
        source=metadata["source"].decode(),
        task_id=int(metadata["task_id"]),
        seed=int(metadata["seed"]),
        init_state_id=int(metadata["init_state_id"]),
        success=bool(metadata["success"]),
        length=int(metadata["length"]),
        goal_fraction=float(metadata["goal_fraction"]),
    )


def _check(episode: Episode, shapes: EpisodeShapes, i: int) -> None:
    frames = len(episode.timesteps)
    chunks = (frames, shapes.chunk, shapes.action_dim)
    expected = {
        "proprio": (frames, shapes.proprio_dim),
        "actions": chunks,
        "target_actions": chunks,
        "num_actions": (frames,),
    }
    found = {name: getattr(episode, name).shape for name in expected}
    expected |= {f"images[{c!r}]": (frames, *shape) for c, shape in shapes.image_shapes.items()}
    found |= {f"images[{c!r}]": x.shape for c, x in episode.images.items()}
    wrong = [
        f"{name} has shape {found.get(name)}, expected {expected.get(name)}"
        for name in sorted(expected | found)
        if found.get(name) != expected.get(name)
    ]
    if frames == 0:
        wrong.append("it has no frames")
    elif np.any(np.diff(episode.timesteps) <= 0) or episode.timesteps[-1] != episode.length:
        wrong.append(
            f"timesteps must increase and end at its length {episode.length}, "
            f"got {episode.timesteps.tolist()}"
        )
    if wrong:
        raise ValueError(f"episode {i} cannot be stored: {'; '.join(wrong)}")
