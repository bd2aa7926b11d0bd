"""Normalisation statistics from data, and openpi's norm_stats.json."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mbpo_jax.models.normalization import NormStats

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
        ValueError: the file is missing, is not JSON, or lacks a statistic.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))["norm_stats"]
        return {
            key: NormStats(**{field: np.asarray(value[field], np.float64) for field in FIELDS})
            for key, value in content.items()
        }
    except FileNotFoundError as error:
        raise ValueError(f"no normalisation statistics at {path}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not an openpi norm_stats.json: it needs "
            f'{{"norm_stats": {{name: {{{", ".join(FIELDS)}}}}}}} ({error!r})'
        ) from error
