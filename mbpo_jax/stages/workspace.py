"""The working directory: one folder per stage, what it was made with, and whether it finished."""

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from mbpo_jax.files import write_json
from mbpo_jax.training.checkpoints import differences, flat_entries

MIN_FREE_BYTES = 2 * 2**30


class StageError(Exception):
    """Something the user can mend; the message says what, where and how."""


class Workspace:
    """The artefacts of one run in `root`, under the given config.

    A stage's folder holds `config.json` (the part of the config it depends on), its artefacts, and
    when finished `done.json` (a summary with `minutes`). Nothing is ever deleted from it.
    """

    def __init__(self, root: Path, config: ml_collections.ConfigDict):
        self.root = Path(root).absolute()
        self.config = config
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StageError(f"cannot create the working directory {self.root}: {error}") from error

    def directory(self, stage: str) -> Path:
        return self.root / stage

    def summary(self, stage: str) -> dict | None:
        """What the finished stage reported, or None when it is not finished."""
        path = self.directory(stage) / "done.json"
        return _read_json(path) if path.exists() else None

    def require(self, stage: str) -> dict:
        """The summary of a stage that must be finished.

        Raises:
            StageError: naming the stage to run first.
        """
        summary = self.summary(stage)
        if summary is None:
            raise StageError(
                f"the stage {stage!r} has not finished in {self.root}; run it first "
                f"(--stages={stage}), or run all stages by leaving --stages out"
            )
        return summary

    def begin(self, stage: str, sections: Sequence[str]) -> Path:
        """Creates or re-enters the folder of a stage that reads the given config sections.

        Raises:
            StageError: when the folder was made with other values, or the disk is full.
        """
        directory = self.directory(stage)
        directory.mkdir(exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < MIN_FREE_BYTES:
            raise StageError(
                f"only {free / 2**30:.1f} GiB are free at {directory}; a stage needs "
                f"{MIN_FREE_BYTES / 2**30:.0f} GiB. Free some space or choose another --workdir"
            )
        self.check(stage, sections)
        path, entries = directory / "config.json", config_entries(self.config, sections)
        _by_first_process(lambda: path.exists() or write_json(path, entries))
        return directory

    def check(self, stage: str, sections: Sequence[str]) -> None:
        """Raises StageError when the stage's folder was made with other config values."""
        path = self.directory(stage) / "config.json"
        if not path.exists():
            return
        before, now = _read_json(path), config_entries(self.config, sections)
        changes = differences(before, now)
        if changes:
            raise StageError(
                f"{self.directory(stage)} was made with another config:\n"
                + "\n".join(changes)
                + f"\nUse another --workdir, restore these values, or delete {stage} and the "
                "stages after it there to run them again"
            )

    def abandon(self, stage: str) -> None:
        """Forgets the config of a stage that has made nothing, so that another may be tried."""
        (self.directory(stage) / "config.json").unlink(missing_ok=True)

    def finish(self, stage: str, summary: dict) -> None:
        path = self.directory(stage) / "done.json"
        _by_first_process(lambda: write_json(path, summary))


def config_entries(config: ml_collections.ConfigDict, sections: Sequence[str]) -> dict:
    """The entries of some sections of a config under dotted names, as JSON has them. A section may
    be a single entry ("rl.discount")."""
    values = json.loads(config.to_json_best_effort())

    def at(section):
        return functools.reduce(lambda part, key: part[key], section.split("."), values)

    return flat_entries({section: at(section) for section in sections})


def read_config(root: Path, needed: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of the run in `root`, as far as its stages have recorded it.

    Raises:
        StageError: no stage has begun there, what one recorded is damaged, or no stage recorded a
            section or entry that is `needed`.
    """
    config: dict = {}
    for path in sorted(Path(root).glob("*/config.json")):
        for name, value in _read_json(path).items():
            *sections, entry = name.split(".")
            section = config
            for key in sections:
                section = section.setdefault(key, {})
            section[entry] = tuple(value) if isinstance(value, list) else value
    if not config:
        raise StageError(f"{root} is no working directory: no stage has begun there")
    missing = [name for name in needed if name not in config]
    if missing:
        raise StageError(
            f"{root} is incomplete: no stage's config.json there has {', '.join(missing)}; copy "
            "the whole working directory again"
        )
    return ml_collections.ConfigDict(config).lock()


def _by_first_process(write: Callable[[], Any]) -> None:
    """Of several processes the first writes, and the others go on when it has."""
    if jax.process_index() == 0:
        write()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workspace")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no map of entries")
    except (ValueError, OSError) as error:
        raise StageError(
            f"{path} is damaged ({error}): copy it again from where it came, or delete "
            f"{path.parent} and run that stage again"
        ) from error
    return value
