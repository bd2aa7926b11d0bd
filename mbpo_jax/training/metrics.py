"""One metric writer: a JSON line per record for programs, and the loggers of choice for people."""

import importlib.util
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax

from mbpo_jax.files import atomic_write

PROJECT = "mbpo_jax"


class Logger(Protocol):
    """Shows scalars to people."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """`scalars` (name -> finite number) at `step`; steps increase."""

    def close(self) -> None: ...


class MetricWriter:
    """Writes scalars of one run to `metrics.jsonl` in `directory` and to the chosen `loggers`.

    Records of `first_step` and later that an interrupted run left behind are dropped first, so that
    a resumed run's file equals an uninterrupted one's. Of several processes only the first writes.

    Raises:
        ValueError: as `check_loggers`.
    """

    def __init__(
        self, directory: Path, first_step: int = 0, loggers: Sequence[str] = ("tensorboard",)
    ):
        check_loggers(loggers)
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        directory = Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] < first_step]
        self._file = continue_records(self.path, kept)
        self._loggers = [LOGGERS[name](directory, first_step) for name in loggers]

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records `scalars` (name -> number) at `step`."""
        if not self._writes:
            return
        record = {"step": int(step)} | {k: float(v) for k, v in scalars.items()}
        self._file.write(json.dumps(record) + "\n")
        finite = {k: float(v) for k, v in scalars.items() if math.isfinite(v)}
        for logger in self._loggers:
            logger.write(int(step), finite)

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        for logger in self._loggers:
            logger.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class TensorBoard:
    """Events in `directory`/tensorboard."""

    def __init__(self, directory: Path, first_step: int):
        from tensorboardX import SummaryWriter  # not needed by the training core

        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class Tracker:
    """A run of wandb, or of a package with the same interface."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_run(directory: Path, first_step: int) -> Tracker:
    """A run of the project `mbpo_jax`, with its files in `directory`; where it goes is decided by
    wandb's own settings (`WANDB_MODE=offline`, `wandb login`). A resumed run continues its own."""
    import wandb

    run = wandb.init(
        project=PROJECT,
        name=_run_name(directory),
        id=_run_id(directory),
        dir=str(directory),
        resume="allow",
        reinit="create_new",
    )
    return Tracker(run)


def trackio_run(directory: Path, first_step: int) -> Tracker:
    """A run of the project `mbpo_jax` in trackio's local database (`trackio show`). A resumed run
    continues its own."""
    import trackio

    name = f"{_run_name(directory)} {_run_id(directory)}"
    return Tracker(trackio.init(project=PROJECT, name=name, resume="allow"))


LOGGERS: dict[str, Callable[[Path, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": wandb_run,
    "trackio": trackio_run,
}
PACKAGES = {"tensorboard": "tensorboardX"}  # where the package has another name


def check_loggers(names: Sequence[str]) -> None:
    """Raises ValueError for a logger that is unknown or whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"there is no logger {name!r}; choose from {', '.join(LOGGERS)}")
        package = PACKAGES.get(name, name)
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"the logger {name!r} needs the package {package}, which is not installed: "
                f"`pip install {package}`, or choose other loggers"
            )


def _run_name(directory: Path) -> str:
    """Where the run is written, such as `libero_long_micro/world_model/vae`."""
    return "/".join(directory.parts[-3:])


def _run_id(directory: Path) -> str:
    """Drawn once per directory and kept there, so that a resumed run is the same one."""
    path = directory / "run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; an unfinished last line is left out; [] if absent."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]


def continue_records(path: Path, kept: Sequence[Mapping[str, Any]]) -> TextIO:
    """Opens a file of JSON lines, line-buffered, to append to the records `kept`; anything else
    in it, an unfinished last line too, is dropped."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
    return Path(path).open("a", buffering=1)
