"""Metric writers: one JSON line per record for programs, TensorBoard events for people."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO


class MetricWriter:
    """Writes scalars of one run to `metrics.jsonl` and TensorBoard events in `directory`.

    Records of `first_step` and later that an interrupted run left behind are dropped first, so that
    a resumed run's file equals an uninterrupted one's.
    """

    def __init__(self, directory: Path, first_step: int = 0):
        from tensorboardX import SummaryWriter  # not needed by the training core

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] < first_step]
        self._file = continue_records(self.path, kept)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records `scalars` (name -> number) at `step`."""
        record = {"step": int(step)} | {k: float(v) for k, v in scalars.items()}
        self._file.write(json.dumps(record) + "\n")
        for name, value in scalars.items():
            if math.isfinite(value):
                self._board.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; an unfinished last line is left out; [] if absent."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]


def continue_records(path: Path, kept: Sequence[Mapping[str, Any]]) -> TextIO:
    """Opens a file of JSON lines, line-buffered, to append to the records `kept`; anything else
    in it, an unfinished last line too, is dropped."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(path)  # a kill leaves the records that there were
    return Path(path).open("a", buffering=1)
