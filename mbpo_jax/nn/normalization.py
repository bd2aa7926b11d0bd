"""Per-dimension normalisation of actions and proprioception, as openpi does it."""

from typing import Literal

from flax import struct

from mbpo_jax.types import Array

Mode = Literal["quantile", "zscore"]

BOUND = 20.0  # no value of the data that a model is trained on is farther from 0 when normalised
EPSILON = 1e-6  # openpi adds it to both denominators; a constant dimension then maps to a constant


@struct.dataclass
class NormStats:
    """Statistics of one quantity, each of shape [D]; q01 and q99 are its 1 % and 99 % quantiles."""

    mean: Array
    std: Array
    q01: Array
    q99: Array


def normalize(x: Array, stats: NormStats, mode: Mode) -> Array:
    """Raw units to the model's units, over the last axis of `x` [..., D]; keeps the dtype of `x`.

    "quantile" sends [q01, q99] to [-1, 1] (values outside are not clipped); "zscore" gives zero
    mean and unit deviation. Works on NumPy and on traced arrays.

    Raises:
        ValueError: an unknown mode, or `x` and the statistics differ in D.
    """
    offset, scale = _affine(x, stats, mode)
    return ((x - offset) / scale).astype(x.dtype)


def unnormalize(x: Array, stats: NormStats, mode: Mode) -> Array:
    """Inverse of `normalize`, with the same shapes, dtype rule and errors."""
    offset, scale = _affine(x, stats, mode)
    return (x * scale + offset).astype(x.dtype)


def _affine(x: Array, stats: NormStats, mode: Mode) -> tuple[Array, Array]:
    """Offset and scale [D] with normalised = (raw - offset) / scale."""
    if x.shape[-1:] != stats.mean.shape:
        raise ValueError(
            f"cannot normalise an array of shape {x.shape} with statistics of shape "
            f"{stats.mean.shape}: the last axis must match; pass statistics of the same robot"
        )
    if mode == "zscore":
        return stats.mean, stats.std + EPSILON
    if mode == "quantile":
        # 2 (x - q01) / width - 1 = (x - q01 - width / 2) / (width / 2)
        half_width = (stats.q99 - stats.q01 + EPSILON) / 2
        return stats.q01 + half_width, half_width
    raise ValueError(f'unknown normalisation mode {mode!r}: use "quantile" or "zscore"')
