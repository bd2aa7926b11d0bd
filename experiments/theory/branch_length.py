"""How long a branch should be: the trade-off between model error and off-policy error.

A longer branch replaces chunks that the data policy chose by chunks that the current policy
chooses, at the price of imagining them.
"""

from collections.abc import Sequence

import numpy as np

from experiments.theory import bounds, checks

BOUNDS = ("corrected", "saturating", "published")
# LIBERO-Long: episodes of 520 steps are 52 chunks of 10.
_LONGEST = 52


def branch_length_curve(
    eps_pi: float | Sequence[float],
    eps_m: float | Sequence[float],
    gamma: float,
    k: int,
    *,
    r_max: float = 1.0,
    n_max: int | None = None,
    bound: str = "corrected",
) -> np.ndarray:
    """The bound on the gap of branches of n = 0, …, n_max chunks: float64 [n_max + 1].

    eps_pi: divergence of the current from the data policy, a number, or one per branch length n
        (length n_max + 1).
    eps_m: chunk error of the model, a number, or one per position j = 0, …, n_max − 1 in the
        branch (how the error grows with the horizon).
    bound: "corrected" (README, corollary 2; given rewards), 2R [Γ^(n+1)/(1−Γ)² ε_π(n) +
        Σ_{j<n} Γ^(j+1)/(1−Γ) ε_m(j)]; "saturating" (corollary 3, for worst-case errors);
        "published" (arXiv 2603.20607) with the worst ε_m of the first n positions.

    n_max defaults to the length of `eps_m`, or 52. Raises ValueError for γ ∉ [0, 1), k < 1,
    errors outside [0, 1] and sequences of the wrong length.
    """
    checks.check_gamma(gamma)
    checks.check_chunk(k)
    checks.check_reward_bound(r_max)
    checks.check_error("eps_pi", eps_pi)
    checks.check_error("eps_m", eps_m)
    checks.check_choice("bound", bound, BOUNDS)
    if n_max is None:
        n_max = len(eps_m) if np.ndim(eps_m) else _LONGEST
    n_max = checks.check_finite_branch(n_max)
    eps_pi = _per_position("eps_pi", eps_pi, n_max + 1)
    eps_m = _per_position("eps_m", eps_m, n_max)
    lengths = np.arange(n_max + 1)
    if bound == "published":
        factors = bounds.branched(gamma, k, lengths, r_max)
        worst = np.maximum.accumulate(np.concatenate([[0.0], eps_m]))
        return factors.eps_pi * eps_pi + factors.eps_m * worst
    discount = bounds.chunk_discount(gamma, k)
    scale = 2 * bounds.chunk_reward_bound(gamma, k, r_max)
    powers = discount**lengths
    if bound == "corrected":
        inside = np.concatenate([[0.0], np.cumsum(powers[1:] * eps_m)]) / (1 - discount)
        return scale * (discount * powers / (1 - discount) ** 2 * eps_pi + inside)
    agree = np.cumprod(np.concatenate([[1.0], 1 - eps_m]))
    inside = np.concatenate([[0.0], np.cumsum((powers * agree)[:-1])])
    outside = powers * agree / (1 - discount * (1 - eps_pi))
    return scale * (1 / (1 - discount) - inside - outside)


def _per_position(name: str, value, length: int) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if value.ndim and value.shape != (length,):
        raise ValueError(f"{name} must be a number or have {length} entries, got {value.shape}")
    return np.broadcast_to(value, (length,))


def optimal_branch_length(
    eps_pi: float | Sequence[float],
    eps_m: float | Sequence[float],
    gamma: float,
    k: int,
    *,
    r_max: float = 1.0,
    n_min: int = 1,
    n_max: int | None = None,
    bound: str = "corrected",
) -> int:
    """The n in [n_min, n_max] with the smallest bound, the shortest of equals.

    Arguments as for `branch_length_curve`. Under the corrected bound, with constant ε_π and errors
    ε_m(j) that do not fall, this is the first n with ε_m(n) ≥ ε_π: one more chunk pays as long as
    the model errs less on it than the data policy would. With constant errors it is therefore
    always n_min or n_max; the interior optimum of the published bound is a product of its slack.
    The decoded reward's bound is a multiple of this one and has the same optimum.
    """
    values = branch_length_curve(eps_pi, eps_m, gamma, k, r_max=r_max, n_max=n_max, bound=bound)
    n_min = checks.check_finite_branch(n_min, "n_min")
    if n_min >= len(values):
        raise ValueError(f"n_min must not exceed n_max={len(values) - 1}, got n_min={n_min}")
    candidates = values[n_min:]
    # Equal bounds differ by rounding; a longer branch has to be better by more than that.
    within = candidates <= candidates.min() + 1e-12 * max(candidates.max(), 1e-300)
    return n_min + int(np.argmax(within))
