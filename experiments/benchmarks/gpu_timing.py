"""Timing programs that may not fit the device, nor the time that is left."""

import dataclasses
import gc
import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.flops import program_flops
from mbpo_jax.types import Params

GIB = 2**30
FEWEST_RUNS, MOST_RUNS, SECONDS_OF_RUNS = 5, 50, 2.0
USUAL_SHARE_OF_PEAK = 0.2  # for the estimate of a row's time before it runs


@dataclasses.dataclass(frozen=True)
class Work:
    """What a row times.

    arguments: makes them; called once the program is compiled and known to fit.
    carries: the first of the results is the next run's first argument, whose memory it takes.
    chunks: imagined by a run.
    """

    function: Callable
    arguments: Callable[[], tuple]
    carries: bool = False
    chunks: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """`work(params, batch)` for the first of `batches` that fits the device."""

    work: Callable[[Params, int], Work]
    batches: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share parameters."""

    params: Callable[[], Params]
    rows: Mapping[str, Row]


class Skipped(Exception):
    """Why a row was not measured."""


class TooLarge(Skipped):
    """A program that does not fit the device."""


class Bench:
    """Times rows within a number of minutes; knows the measured peak of matrix products once the
    first row has run.

    Args:
        profile: name of the row that is also traced, into `directory/trace`.
        compile_seconds: expected of a compilation.
    """

    def __init__(self, directory: Path, minutes: float, compile_seconds: float, profile: str = ""):
        self.directory, self.profile = Path(directory), profile
        self.minutes, self.compile_seconds = minutes, compile_seconds
        self.deadline = time.monotonic() + 60 * minutes
        self.peak: float | None = None

    def params(self, group: Group) -> Params:
        """Raises Skipped where they do not fit, or there is no time to use them."""
        shapes = jax.tree.leaves(jax.eval_shape(group.params))
        needed = sum(x.size * x.dtype.itemsize for x in shapes)
        limit = device_memory("bytes_limit")
        if limit and needed > limit:
            raise Skipped(
                f"its parameters take {needed / GIB:.1f} GiB, and JAX has {limit / GIB:.1f}"
            )
        self._check_time(self.compile_seconds)
        return jax.block_until_ready(group.params())

    def row(self, name: str, row: Row, params: Params) -> dict:
        """Numbers of the first batch that fits.

        Raises:
            Skipped: none fits, or there is no time.
        """
        problem = ""
        for batch in row.batches:
            try:
                return self._measured(name, row.work(params, batch), batch)
            except TooLarge as error:
                problem = str(error)
            gc.collect()  # what the attempt has left on the device
        raise Skipped(problem)

    def _measured(self, name: str, work: Work, batch: int) -> dict:
        jitted = jax.jit(work.function, donate_argnums=(0,) if work.carries else ())
        traced = jitted.trace(*jax.eval_shape(work.arguments))
        flops = program_flops(traced.jaxpr.jaxpr)
        expected = flops / (USUAL_SHARE_OF_PEAK * self.peak) if self.peak else 0.0
        self._check_time(self.compile_seconds + (1 + FEWEST_RUNS) * expected)
        before = device_memory("peak_bytes_in_use")
        try:
            started = time.perf_counter()
            compiled = traced.lower().compile()
            compile_seconds = time.perf_counter() - started
            needed = _checked_need(compiled, batch)
            seconds = self._seconds(name, work, compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TooLarge(f"out of memory at batch {batch}") from None
        after = device_memory("peak_bytes_in_use")
        middle, best = float(np.median(seconds)), min(seconds)
        if name == "matrix_peak":
            self.peak = flops / best
        rate = {"chunks_per_second": work.chunks / middle} if work.chunks else {}
        return {
            "batch": batch,
            "milliseconds": 1e3 * middle,
            "fastest_milliseconds": 1e3 * best,
            "runs": len(seconds),
            "compile_seconds": compile_seconds,
            "flops": flops,
            "flops_per_second": flops / middle,
            "share_of_peak": flops / middle / self.peak if self.peak else None,
            "program_bytes": needed,
            # JAX keeps one high-water mark of the process: it is this row's where it has risen.
            "peak_bytes": after if after != before else None,
        } | rate

    def _seconds(self, name: str, work: Work, compiled: Callable) -> list[float]:
        arguments = work.arguments()

        def run() -> float:
            nonlocal arguments
            started = time.perf_counter()
            results = jax.block_until_ready(compiled(*arguments))
            elapsed = time.perf_counter() - started
            if work.carries:
                arguments = (results[0], *arguments[1:])
            return elapsed

        first = run()
        self._check_time(FEWEST_RUNS * first)
        seconds: list[float] = []
        while len(seconds) < FEWEST_RUNS or (
            len(seconds) < MOST_RUNS and sum(seconds) < SECONDS_OF_RUNS
        ):
            seconds.append(run())
        if name == self.profile:
            with jax.profiler.trace(self.directory / "trace"):
                run()
            print(top_operations(self.directory / "trace"), flush=True)
        return seconds

    def _check_time(self, seconds: float) -> None:
        left = self.deadline - time.monotonic()
        if seconds > left:
            raise Skipped(
                f"it would take about {seconds:.0f} s, and of --minutes={self.minutes:g} "
                f"{max(left, 0):.0f} s are left"
            )


def _checked_need(compiled: Any, batch: int) -> int:
    """Bytes that a program needs. Raises TooLarge where that is more than JAX has."""
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    needed = arguments + memory.output_size_in_bytes + memory.temp_size_in_bytes
    needed -= memory.alias_size_in_bytes
    limit = device_memory("bytes_limit")
    if limit and needed > limit:
        raise TooLarge(
            f"{needed / GIB:.1f} GiB are needed at batch {batch}, and JAX has {limit / GIB:.1f}"
        )
    return needed


def device_memory(statistic: str) -> int | None:
    """Of the first device; None on a CPU, which keeps no account."""
    return (jax.devices()[0].memory_stats() or {}).get(statistic)


def top_operations(directory: Path, count: int = 10) -> str:
    """The operations that took most of a trace's time on the device, one a line."""
    newest = max(Path(directory).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    named = [e for e in events if e.get("ph") == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    on_device = any("/device:" in name for name in processes.values())
    spent: Counter[str] = Counter()
    for event in events:
        process = processes.get(event.get("pid"), "")
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        kernels = "/device:" in process and "Stream" in thread
        if event.get("ph") == "X" and (kernels if on_device else "XLA" in thread):
            spent[event["name"]] += event["dur"]
    total = max(sum(spent.values()), 1e-9)
    lines = [f"{us / 1e3:10.2f} ms {us / total:6.1%}  {n}" for n, us in spent.most_common(count)]
    return "\n".join([f"trace in {newest.parent}", *lines])
