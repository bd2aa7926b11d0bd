"""Normalisation statistics from data, and openpi's norm_stats.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mbpo_jax.nn.normalization import BOUND, EPSILON, Mode, NormStats, normalize

FIELDS = ("mean", "std", "q01", "q99")


def compute_norm_stats(x: np.ndarray) -> NormStats:
    """Statistics of `x` [..., D] over all leading axes, float64 [D].

    Raises:
        ValueError: no rows, or values that are not finite.
    """
    if x.ndim < 2:
        raise ValueError(f"normalisation statistics need rows and dimensions, got shape {x.shape}")
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    if len(rows) == 0:
        raise ValueError("normalisation statistics need at least one row, got an empty array")
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=0)).tolist()
        raise ValueError(f"values that are not finite in dimensions {bad}: drop those episodes")
    q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
    return NormStats(mean=rows.mean(axis=0), std=rows.std(axis=0), q01=q01, q99=q99)


def widen(
    stats: NormStats, x: np.ndarray, mode: Mode, names: Sequence[str]
) -> tuple[NormStats, list[str]]:
    """Statistics by which no value of `x` [..., D] is normalised beyond ±BOUND, and a line for each
    dimension (called `names`) where that takes others than its own.

    Where the quantiles ("quantile") or the deviation ("zscore") of a dimension lie that far inside
    its extremes, as where it is zero but for a step in hundreds, they are widened about their
    middle until the farthest value is at ±BOUND. All other dimensions keep openpi's numbers.
    """
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    wide = np.abs(normalize(rows, stats, mode)).max(axis=0) > BOUND
    middle = stats.mean if mode == "zscore" else (stats.q01 + stats.q99) / 2
    half = np.abs(rows - middle).max(axis=0) / BOUND
    if mode == "zscore":
        widened = stats.replace(std=np.where(wide, half, stats.std))
    else:
        widened = stats.replace(
            q01=np.where(wide, middle - half, stats.q01),
            q99=np.where(wide, middle + half, stats.q99),
        )
    lines = [
        f"{names[i]} goes from {rows[:, i].min():.3g} to {rows[:, i].max():.3g}, its "
        + _spread(stats, mode, i)
        for i in np.flatnonzero(wide)
    ]
    return widened, lines


def far_extremes(stats: NormStats, mode: Mode, names: Sequence[str]) -> list[str]:
    """A line for each dimension some value of which must lie beyond ±BOUND when normalised, as far
    as its statistics alone tell: some value is at least a standard deviation from any middle."""
    if mode == "zscore":
        return []
    half = (stats.q99 - stats.q01 + EPSILON) / 2
    # The deviation of a constant may be rounding of this size, where openpi has summed in float32.
    real = stats.std > 1e-3 * np.abs(stats.mean)
    return [
        f"{names[i]} has a standard deviation of {stats.std[i]:.3g}, its {_spread(stats, mode, i)}"
        for i in np.flatnonzero(real & (stats.std > BOUND * half))
    ]


def _spread(stats: NormStats, mode: Mode, i: int) -> str:
    if mode == "zscore":
        return f"standard deviation is {stats.std[i]:.3g}"
    return f"1 % and 99 % quantiles are {stats.q01[i]:.3g} and {stats.q99[i]:.3g}"


def write_norm_stats(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    """Writes openpi's norm_stats.json; its keys for a robot are "state" and "actions"."""
    content = {
        key: {field: np.asarray(getattr(value, field)).tolist() for field in FIELDS}
        for key, value in stats.items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"norm_stats": content}, indent=2), encoding="utf-8")


def read_norm_stats(path: str | Path) -> dict[str, NormStats]:
    """Reads openpi's norm_stats.json without loss (float64 [D]).

    Raises:
        ValueError: the file is missing, is not JSON, lacks a statistic, or has one that is not a
            list of finite numbers of the same length as the others, or that no data can have.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))["norm_stats"]
        found = {
            key: NormStats(**{field: np.asarray(value[field], np.float64) for field in FIELDS})
            for key, value in content.items()
        }
        for key in ("state", "actions"):
            _check(key, found[key])
    except FileNotFoundError as error:
        raise ValueError(f"no normalisation statistics at {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an openpi norm_stats.json: it needs "
            f'{{"norm_stats": {{"state" and "actions": {{{", ".join(FIELDS)}}}}}}} ({error!r}); '
            "copy it again from where it came"
        ) from error
    return found


def _check(key: str, stats: NormStats) -> None:
    arrays = {field: getattr(stats, field) for field in FIELDS}
    for field, array in arrays.items():
        if array.ndim != 1 or array.shape != stats.mean.shape or not np.isfinite(array).all():
            raise ValueError(f"{key}.{field} is no list of {stats.mean.size} finite numbers")
    if (stats.std < 0).any() or (stats.q99 < stats.q01).any():
        raise ValueError(f"{key} has a std below 0, or a q99 below its q01")
