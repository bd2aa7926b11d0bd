"""Finished episodes on disk, one file each, so that a stopped collection loses nothing."""

import dataclasses
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from mbpo_jax.episode import Episode

_IMAGE = "image/"
_ARRAYS = ("timesteps", "proprio", "actions", "target_actions", "num_actions")
_SCALARS = tuple(
    field.name for field in dataclasses.fields(Episode) if field.name not in (*_ARRAYS, "images")
)


class EpisodeSpool:
    """A directory of episodes under names chosen by the caller (letters, digits, "-", "_", ".").

    An episode is there completely or not at all; several processes may add at the same time.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, episode: Episode) -> None:
        """Stores `episode` as `name`, replacing an earlier one of that name."""
        content = {key: getattr(episode, key) for key in (*_ARRAYS, *_SCALARS)}
        content |= {_IMAGE + camera: image for camera, image in episode.images.items()}
        handle, temporary = tempfile.mkstemp(dir=self.directory, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, **content)
            os.replace(temporary, self._path(name))
        finally:
            Path(temporary).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Names of the stored episodes, sorted."""
        return sorted(path.stem for path in self.directory.glob("*.npz"))

    def load(self, name: str) -> Episode:
        """The episode stored as `name`.

        Raises:
            ValueError: there is none of that name, or its file is corrupt.
        """
        path = self._path(name)
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {key: file[key] for key in file.files}
            return Episode(
                images={
                    key.removeprefix(_IMAGE): content[key]
                    for key in content
                    if key.startswith(_IMAGE)
                },
                **{key: content[key] for key in _ARRAYS},
                **{key: content[key].item() for key in _SCALARS},
            )
        except FileNotFoundError as error:
            raise ValueError(f"no episode {name!r} in {self.directory}") from error
        except (zipfile.BadZipFile, KeyError, EOFError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} is corrupt or truncated ({error}): delete this file and run the stage "
                "that collects episodes again; it repeats only this episode"
            ) from error

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.npz"
