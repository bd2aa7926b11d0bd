"""Timing peers against each other on a machine that other jobs share."""

import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[], float]  # does the work once and returns the seconds it took


def timed(function: Callable, *arguments) -> Run:
    """Seconds of `function(*arguments)` until its results are there."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - start

    return run


def interleave(runs: Mapping[str, Run], repeats: int, name: str) -> dict[str, np.ndarray]:
    """Seconds [repeats] of each run. Every round does all of them, in an order that alternates, so
    that the machine's noise falls on all alike; a first round (compilation) is not counted."""
    from tqdm import tqdm  # not needed by the target gpu

    seconds = {key: [] for key in runs}
    for i in tqdm(range(repeats + 1), desc=name):
        for key in sorted(runs, reverse=bool(i % 2)):
            seconds[key].append(runs[key]())
    return {key: np.asarray(values[1:]) for key, values in seconds.items()}


def measured(
    seconds: Mapping[str, np.ndarray], flops: float | None = None, peak: float | None = None
) -> dict[str, float]:
    """Numbers of one race: median "seconds" of the run "ours", its "flops_per_second" and
    "share_of_peak" where `flops` of one run and the machine's `peak` FLOP/s are given, and, if
    there is a run "peer", "peer_seconds" and the `ratio` to it."""
    middle = float(np.median(seconds["ours"]))
    row = {"seconds": middle}
    if flops is not None:
        speed = flops / middle
        row |= {"flops": flops, "flops_per_second": speed, "share_of_peak": speed / peak}
    if "peer" in seconds:
        row["peer_seconds"] = float(np.median(seconds["peer"]))
        row |= ratio(seconds["ours"], seconds["peer"])
    return row


def ratio(ours: np.ndarray, peer: np.ndarray, resamples: int = 2000) -> dict[str, float]:
    """Median of ours / peer over the rounds, with its 95 % bootstrap interval."""
    quotients = ours / peer
    rng = np.random.default_rng(0)
    draws = rng.choice(quotients, (resamples, len(quotients)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"ratio": float(np.median(quotients)), "low": float(low), "high": float(high)}


def matmul_peak(dtype: jnp.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of a [size, size] matrix product of `dtype`: the best of `repeats`."""
    x = jnp.ones((size, size), dtype)
    run = timed(jax.jit(jnp.matmul), x, x)
    run()
    return 2.0 * size**3 / min(run() for _ in range(repeats))
