"""Input checks of the theory package: errors that name the argument and its value.

Values are checked only where they are concrete; under `jit`, `vmap` and `grad` a tracer has no
value, so there only shapes are checked.
"""

import difflib
import math

import jax
import numpy as np


def is_traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def check_gamma(gamma) -> None:
    """`gamma`, scalar or array, must lie in [0, 1)."""
    if is_traced(gamma):
        return
    values = np.asarray(gamma, np.float64)
    if not np.all((values >= 0.0) & (values < 1.0)):
        raise ValueError(f"gamma must lie in [0, 1), got gamma={gamma}")


def check_chunk(k) -> None:
    """`k`, scalar or array of whole numbers, must be at least 1."""
    values = np.asarray(k, np.float64)
    if not np.all((values >= 1) & (values == np.floor(values)) & np.isfinite(values)):
        raise ValueError(f"k, the steps of a chunk, must be a whole number >= 1, got k={k}")


def check_branch(n, name: str = "n") -> None:
    """A branch length, scalar or array of whole numbers >= 0; infinity is allowed."""
    values = np.asarray(n, np.float64)
    if not np.all((values >= 0) & (values == np.floor(values))):
        raise ValueError(
            f"{name}, the chunks of a branch, must be a whole number >= 0 or infinity, "
            f"got {name}={n}"
        )


def check_finite_branch(n, name: str = "n_max") -> int:
    """A finite branch length as a Python integer."""
    check_branch(n, name)
    if math.isinf(n):
        raise ValueError(f"{name} must be finite, got {name}={n}")
    return int(n)


def check_reward_bound(r_max) -> None:
    """`r_max`, scalar or array, must be finite and not negative."""
    values = np.asarray(r_max, np.float64)
    if not np.all((values >= 0) & np.isfinite(values)):
        raise ValueError(f"r_max must be finite and >= 0, got r_max={r_max}")


def check_error(name: str, value) -> None:
    """An error epsilon, a total variation: within [0, 1], scalar or array."""
    if is_traced(value):
        return
    values = np.asarray(value, np.float64)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"{name} is a total variation and must lie in [0, 1], got {name}={value}")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """`value` must be one of `known`; the error names the nearest."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)
        raise ValueError(f"{name}={value!r} is not known; did you mean {near[0]!r}? One of {known}")


def check_shape(name: str, x, shape: tuple[int | None, ...]) -> None:
    """`x.shape` must equal `shape`, where None stands for any size."""
    got = tuple(np.shape(x))
    if len(got) != len(shape) or any(s is not None and s != g for s, g in zip(shape, got)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {got}")


def check_finite(name: str, x) -> None:
    """No infinities and no NaN in `x`."""
    if not is_traced(x) and not np.all(np.isfinite(np.asarray(x))):
        raise ValueError(f"{name} must be finite, got {name}={np.asarray(x)}")


def check_distribution(name: str, x) -> None:
    """The last axis of `x` must be non-negative and sum to one."""
    if is_traced(x):
        return
    values = np.asarray(x, np.float64)
    if not np.all(values >= 0):
        raise ValueError(f"{name} holds a negative probability (or NaN): minimum {values.min()}")
    sums = values.sum(-1)
    # What float32 can promise: tables made in float32 are accepted.
    if not np.all(np.abs(sums - 1.0) <= 1e-5):
        worst = np.asarray(sums).flat[np.argmax(np.abs(sums - 1.0))]
        raise ValueError(f"{name} must sum to one over its last axis, got a sum of {worst}")
