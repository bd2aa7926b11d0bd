"""Honest numbers about success: intervals, paired tests, correlations, and those of evaluations."""

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
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


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


def start_of(record: dict) -> tuple[int, int, int]:
    """What an episode started from: its task, its fixed init state and its seed, -1 for none."""
    return record["task"], record["init_state"], record.get("seed", -1)


def summarize(episodes: list[dict], tasks) -> dict:
    """Success with its 95 % Wilson interval, overall and per task."""

    def part(chosen):
        solved = [e["length"] for e in chosen if e["success"]]
        return success_rate(len(solved), len(chosen)) | {
            "goal_fraction": float(np.mean([e["goal_fraction"] for e in chosen])),
            "mean_length": float(np.mean([e["length"] for e in chosen])),
            "mean_length_of_successes": float(np.mean(solved)) if solved else None,
            "seconds_per_episode": float(np.mean([e["seconds"] for e in chosen])),
        }

    per_task = {str(t): part([e for e in episodes if e["task"] == t]) for t in tasks}
    return part(episodes) | {"tasks": per_task}


def paired_comparison(first: list[dict], second: list[dict]) -> dict:
    """Exact McNemar test on the episodes that both policies started alike."""
    outcome = {start_of(e): e["success"] for e in first}
    pairs = [(outcome[key], e["success"]) for e in second if (key := start_of(e)) in outcome]
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    return {
        "pairs": len(pairs),
        "both": sum(a and b for a, b in pairs),
        "first_only": first_only,
        "second_only": second_only,
        "neither": sum(not a and not b for a, b in pairs),
        "p_value": mcnemar_exact(first_only, second_only),
    }
