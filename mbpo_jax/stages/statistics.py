"""Honest numbers about success: intervals, paired tests, correlations."""

import math

import numpy as np
from scipy import stats


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927; Brown, Cai and DasGupta 2001).

    Raises:
        ValueError: when there are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is not a sample")
    z = stats.norm.ppf(0.5 + confidence / 2)
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials)
    half *= math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def success_rate(successes: int, trials: int) -> dict:
    """How many episodes succeeded, with the 95 % Wilson interval of their share."""
    return {
        "episodes": trials,
        "successes": successes,
        "success_rate": successes / trials,
        "interval": list(wilson_interval(successes, trials)),
    }


def newcombe_interval(
    first: tuple[int, int], second: tuple[int, int], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference of two independent success rates, the first's minus the second's,
    from the Wilson interval of each (Newcombe 1998, method 10).

    Args:
        first, second: (successes, trials).

    Raises:
        ValueError: as `wilson_interval`.
    """
    (rate, low, high), (other, other_low, other_high) = (
        (successes / max(trials, 1), *wilson_interval(successes, trials, confidence))
        for successes, trials in (first, second)
    )
    below, above = (
        math.hypot(rate - low, other_high - other),
        math.hypot(high - rate, other - other_low),
    )
    return rate - other - below, rate - other + above


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """Two-sided exact McNemar test: the p-value of the discordant pairs under a fair coin.

    Args:
        first_only: pairs in which only the first policy succeeded.
        second_only: pairs in which only the second did.
    """
    discordant = first_only + second_only
    if discordant == 0:
        return 1.0
    return float(stats.binomtest(second_only, discordant, 0.5).pvalue)


def within_groups(x: np.ndarray, y: np.ndarray, size: int) -> dict:
    """Pearson's correlation of x and y [M] after each group of `size` neighbours has lost its mean:
    whether x tells which member of a group has more of y.

    Returns "correlation", 0 where nothing varies within a group, and its 95 % "interval" from 1000
    bootstrap samples of the groups.
    """
    x, y = (np.asarray(a, np.float64).reshape(-1, size) for a in (x, y))
    x, y = (a - a.mean(1, keepdims=True) for a in (x, y))
    parts = np.stack([(x * y).sum(1), np.square(x).sum(1), np.square(y).sum(1)])

    def correlation(sums: np.ndarray) -> np.ndarray:
        both = np.sqrt(sums[1] * sums[2])
        return np.divide(sums[0], both, out=np.zeros_like(both), where=both > 0)

    drawn = np.random.default_rng(0).integers(0, len(x), (1000, len(x)))
    low, high = np.percentile(correlation(parts[:, drawn].sum(-1)), [2.5, 97.5])
    return {
        "correlation": float(correlation(parts.sum(-1))),
        "interval": [float(low), float(high)],
    }
