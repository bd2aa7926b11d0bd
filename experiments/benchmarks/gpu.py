"""Times of the released sizes on one accelerator, in minutes and with little installed.

All that it imports needs jax, flax, optax, orbax-checkpoint and chex alone. Parameters are
random. Rows run in a fixed order and are written down one by one, so that a run that is cut off
keeps what it had.
"""

import gc
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.gpu_rows import groups, row_names, sizes
from experiments.benchmarks.gpu_timing import GIB, Bench, Skipped
from mbpo_jax.files import atomic_write

MEMORY_SHARE = "0.93"  # of the device that JAX takes; its default, 0.75, is too little for π0.5


def run(
    size: str,
    directory: Path,
    minutes: float = 8.0,
    only: Collection[str] = (),
    profile: str = "",
) -> int:
    """Times all rows (or `only` some, and the matrix peak) and prints and records each at once;
    returns how many failed.

    Raises:
        ValueError: an unknown row, full size on a CPU, or a damaged record of earlier runs.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    if size == "full" and jax.default_backend() == "cpu":
        raise ValueError("JAX sees no accelerator here: --size=tiny, or install jax[cuda13]")
    chosen = sizes(size)
    names = row_names(chosen)
    for name in [*only, *([profile] if profile else [])]:
        if name not in names:
            raise ValueError(f"there is no row {name!r}; rows: {', '.join(names)}")
    device = jax.devices()[0]
    about = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "size": size,
    }
    record = Record(directory, about)
    for earlier in record.earlier:
        measured = [row["row"] for row in earlier["rows"] if "milliseconds" in row]
        print(f"{record.path} has a run of {earlier['started']}: {', '.join(measured)}")
    print(f"{device.device_kind}, JAX {jax.__version__}, sizes {size}\n{_HEADER}", flush=True)
    bench = Bench(directory, minutes, chosen.compile_seconds, profile)

    def add(name: str, outcome: dict) -> None:
        record.add({"row": name} | outcome)
        print(_line(record.rows[-1]), flush=True)

    for group in groups(chosen):
        rows = {n: r for n, r in group.rows.items() if not only or n in (*only, "matrix_peak")}
        if not rows:
            continue
        params, problem = _attempt(bench.params, group)
        for name, row in rows.items():
            found, row_problem = (
                (None, problem) if problem else _attempt(bench.row, name, row, params)
            )
            add(name, found or row_problem)
        del params
        gc.collect()
    skipped = [row["row"] for row in record.rows if "skipped" in row]
    if skipped:
        print(f"skipped; again with --rows={','.join(skipped)}")
    print(f"written to {record.path}")
    return sum("failed" in row for row in record.rows)


def _attempt(function: Callable, *arguments: Any) -> tuple[Any, dict]:
    """The result, or else why there is none; one row's failure must not end the others'."""
    try:
        return function(*arguments), {}
    except Skipped as reason:
        return None, {"skipped": str(reason)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, {"failed": f"{type(error).__name__}: {lines[0][:300]}"}


_HEADER = (
    f"{'row':22}{'batch':>6}{'ms':>10}{'compile s':>11}{'TFLOP/s':>9}{'of peak':>9}"
    f"{'program GiB':>13}{'peak GiB':>10}"
)


def _line(row: dict) -> str:
    if "milliseconds" not in row:
        return f"{row['row']:22}" + "; ".join(f"{k}: {v}" for k, v in row.items() if k != "row")
    share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
    line = f"{row['row']:22}{row['batch']:6}{row['milliseconds']:10.2f}"
    line += f"{row['compile_seconds']:11.1f}{row['flops_per_second'] / 1e12:9.2f}{share:>9}"
    line += f"{row['program_bytes'] / GIB:13.2f}{peak:>10}"
    if "chunks_per_second" in row:
        line += f"  {row['chunks_per_second']:.0f} chunks/s"
    return line


class Record:
    """`gpu.json` in a folder: a list of runs, each with its machine and rows, written after every
    row. Earlier runs stay.

    Raises:
        ValueError: the file that is there is damaged.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        self.path = Path(directory) / "gpu.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.earlier = []
        if self.path.exists():
            try:
                self.earlier = json.loads(self.path.read_text())["runs"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} is damaged ({error}): move it away, or choose another --out"
                ) from error
        self.rows: list[dict] = []
        self._about = dict(about)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        runs = [*self.earlier, self._about | {"rows": self.rows}]
        with atomic_write(self.path) as file:
            file.write(json.dumps({"runs": runs}, indent=1) + "\n")
