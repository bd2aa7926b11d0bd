"""Where anyone's dataset is and how it is to be read."""

import dataclasses
import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path

from mbpo_jax.data.formats.conversion import Layout
from mbpo_jax.data.formats.recording import Entry, Names
from mbpo_jax.stages.build import Config, robot
from mbpo_jax.stages.workspace import StageError

FORMATS = ("libero_hdf5", "rlds", "lerobot")  # modules of mbpo_jax.data.formats


@dataclasses.dataclass(frozen=True)
class Import:
    """A dataset to be read.

    Attributes:
        format: one of FORMATS.
        source: where it is.
        renames, given: as for `Names`.
        ranges, orientation: as in `Layout`.
        skip_bad: leaves bad episodes out.
        successes_only: leaves failures out.
    """

    format: str
    source: Path
    renames: Mapping[str, str]
    skip_bad: bool
    successes_only: bool = True
    given: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    ranges: tuple[tuple[str, float, float], ...] = ()
    orientation: str = ""

    def layout(self, config: Config) -> Layout:
        """What the config asks of an episode.

        Raises:
            StageError: a range is of no action dimension of the robot, or one has two ranges.
            ValueError: the config's robot contradicts itself.
        """
        embodiment = robot(config)
        names = [name for name, _, _ in self.ranges]
        for name in names:
            if names.count(name) > 1:
                raise StageError(f"--range of {name!r} is given {names.count(name)} times")
            if name not in embodiment.actions:
                raise StageError(
                    f"--range of {name!r}: the robot {embodiment.name} has no such action "
                    f"dimension, but {', '.join(embodiment.actions)}"
                )
        return Layout(
            suite=config.suite,
            cameras=tuple(config.cameras),
            image_size=config.image_size,
            chunk=config.chunk,
            render_every=config.demonstrations.render_every,
            robot=embodiment,
            orientation=self.orientation,
            ranges=self.ranges,
        )

    def entries(self, config: Config) -> list[Entry]:
        """The source's recordings, unread.

        Raises:
            StageError: the format's reader is not installed, the source has another format, or a
                rename is to nothing that there is.
        """
        try:
            module = importlib.import_module(f"mbpo_jax.data.formats.{self.format}")
        except ModuleNotFoundError as error:
            raise StageError(
                f"reading {self.format} needs the package {error.name}: pip install -e '.[import]'"
            ) from error
        if not self.source.exists():
            raise StageError(f"there is nothing at {self.source}")
        try:
            return module.entries(self.source, Names(config.cameras, self.renames, self.given))
        except ValueError as error:
            raise StageError(str(error)) from error

    def fingerprint(self, config: Config) -> str:
        """Differs for another import, another config, and files that were changed."""
        files = self.source.rglob("*") if self.source.is_dir() else [self.source]
        stats = sorted(
            (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()
        )
        what = (self.format, tuple(self.renames.items()), sorted(self.given.items()), stats)
        what = (*what, self.layout(config), config.tasks, self.successes_only)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
