"""Honest numbers about success: intervals and paired tests."""

import math

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
