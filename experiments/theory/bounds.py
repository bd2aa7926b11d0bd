"""Value-gap bounds: |true return of π − return estimated with a model| ≤ C_π ε_π + C_m ε_m.

Notation: γ per step, k steps in a chunk, Γ = γ^k, n chunks in a branch, |r| ≤ r_max, and
R = r_max (1−Γ)/(1−γ), the largest chunk reward. ε's are total variations (half the L1 distance).
ε_π compares the current policy π with the data policy π_D over chunks.

Two things a bound has to fix, and which decide whether it is true (see README.md):

rewards
    "given": a chunk earns its true expected reward R(s, u), only the states are imagined;
    "accumulated": the k step rewards r(s, a) are collected inside the step model;
    "decoded": one reward g(s') per chunk, read off the imagined state at the chunk's end.
measured
    where ε_m is averaged. "data": under the data policy's states and chunks; "current": under the
    current policy's chunks, on the states of the branch (or, equally good, on π's own states).

All functions take scalars or broadcastable NumPy arrays; n may be infinite. They raise ValueError
for γ ∉ [0, 1), k < 1, n < 0, r_max < 0.
"""

from typing import NamedTuple

import numpy as np

from experiments.theory import checks

REWARDS = ("given", "accumulated", "decoded")
MEASURED = ("current", "data")


class Coefficients(NamedTuple):
    """Factors of a bound `eps_pi · ε_π + eps_m · ε_m`, in units of the return."""

    eps_pi: float | np.ndarray
    eps_m: float | np.ndarray

    def bound(self, eps_pi, eps_m):
        """The bound at given errors (total variations in [0, 1]); 0 · ∞ counts as 0."""
        checks.check_error("eps_pi", eps_pi)
        checks.check_error("eps_m", eps_m)
        return _product(self.eps_pi, eps_pi) + _product(self.eps_m, eps_m)


def _product(factor, error):
    if np.all(np.isfinite(factor)):
        return factor * error
    return np.where(np.asarray(error) == 0, 0.0, factor * np.where(error == 0, 1.0, error))


def _check(gamma, k, r_max) -> None:
    checks.check_gamma(gamma)
    checks.check_chunk(k)
    checks.check_reward_bound(r_max)


def chunk_discount(gamma, k):
    """Γ = γ^k, the discount between chunks."""
    checks.check_gamma(gamma)
    checks.check_chunk(k)
    return np.power(np.asarray(gamma, np.float64), k)[()]


def chunk_reward_bound(gamma, k, r_max=1.0):
    """R = r_max (1 − γ^k)/(1 − γ), the largest discounted reward of one chunk."""
    _check(gamma, k, r_max)
    return r_max * (1 - chunk_discount(gamma, k)) / (1 - gamma)


# --- MBPO, arXiv 1906.08253 --------------------------------------------------------------------


def mbpo_full_horizon(gamma, r_max=1.0) -> Coefficients:
    """MBPO theorem 4.1: 2γ r_max (ε_m + 2ε_π)/(1−γ)² + 4 r_max ε_π/(1−γ).

    ε_m: worst over time of the expected step error under the data policy.
    """
    _check(gamma, 1, r_max)
    first = 2 * gamma * r_max / (1 - gamma) ** 2
    return Coefficients(2 * first + 4 * r_max / (1 - gamma), first)


def mbpo_branched_data(gamma, n, r_max=1.0) -> Coefficients:
    """MBPO theorem 4.2, branches of n steps, ε_m measured under the *data* policy:

    2 r_max [γ^(n+1) ε_π/(1−γ)² + (γ^n + 2) ε_π/(1−γ) + n (ε_m + 2ε_π)/(1−γ)].
    """
    _check(gamma, 1, r_max)
    checks.check_branch(n)
    power, n = np.power(gamma, n), np.asarray(n, np.float64)[()]
    eps_pi = gamma * power / (1 - gamma) ** 2 + (power + 2 + 2 * n) / (1 - gamma)
    return Coefficients(2 * r_max * eps_pi, 2 * r_max * n / (1 - gamma))


def mbpo_branched_current(gamma, n, r_max=1.0) -> Coefficients:
    """MBPO theorem 4.3, branches of n steps, ε_m measured under the *current* policy:

    2 r_max [γ^(n+1) ε_π/(1−γ)² + γ^n ε_π/(1−γ) + n ε_m/(1−γ)].
    """
    _check(gamma, 1, r_max)
    checks.check_branch(n)
    power, n = np.power(gamma, n), np.asarray(n, np.float64)[()]
    eps_pi = gamma * power / (1 - gamma) ** 2 + power / (1 - gamma)
    return Coefficients(2 * r_max * eps_pi, 2 * r_max * n / (1 - gamma))


# --- VLA-MBPO, arXiv 2603.20607: MBPO applied to the chunk MDP ---------------------------------


def full_horizon(gamma, k, r_max=1.0) -> Coefficients:
    """VLA-MBPO's full-horizon bound (arXiv 2603.20607), as published:

    2 r_max/(1−γ) · [(2Γ/(1−Γ) + 2) ε_π + k Γ/(1−Γ) ε_m], ε_m per *step*, under the data policy.

    It is MBPO theorem 4.1 with discount Γ, reward bound R and chunk error ≤ k ε_m. It holds when
    chunk rewards are given; it does not when step rewards are accumulated in the model.
    """
    _check(gamma, k, r_max)
    scale = 2 * r_max / (1 - gamma)
    discount = chunk_discount(gamma, k)
    ratio = discount / (1 - discount)
    return Coefficients(scale * (2 * ratio + 2), scale * np.asarray(k, np.float64)[()] * ratio)


def branched(gamma, k, n, r_max=1.0) -> Coefficients:
    """VLA-MBPO's bound for branches of n chunks (arXiv 2603.20607), as published:

    2 r_max/(1−γ) · [(γ^(k(n+1))/(1−γ^k) + γ^(kn)) ε_π + n ε_m], ε_m per *chunk*, along the branch.

    It is MBPO theorem 4.3 with discount Γ and reward bound R. It holds for given rewards and for
    decoded rewards when ε_m is measured under the current policy; it does not for accumulated
    rewards, nor when ε_m is measured under the data policy (n ≥ 2).
    """
    _check(gamma, k, r_max)
    checks.check_branch(n)
    scale = 2 * r_max / (1 - gamma)
    discount = chunk_discount(gamma, k)
    power, n = np.power(discount, n), np.asarray(n, np.float64)[()]
    eps_pi = scale * (discount * power / (1 - discount) + power)
    return Coefficients(eps_pi, scale * n)


# --- The bounds that hold, README.md -----------------------------------------------------------


def corrected_full_horizon(gamma, k, r_max=1.0, *, rewards: str = "accumulated") -> Coefficients:
    """Full-horizon rollout of a step model, ε_m per step under the data policy (README, corollary
    1). The accumulated case is the one in which the published constant fails:

    given:       2RΓ/(1−Γ)² (ε_π + k ε_m)
    accumulated: 2 r_max γ/((1−γ)(1−Γ)) ε_π + 2 r_max γ/(1−γ)² ε_m
    decoded:     2 r_max γ^(k−1)/(1−Γ)² (ε_π + k ε_m)
    """
    return _corrected(gamma, k, np.inf, r_max, rewards, "data", per_step=True)


def corrected_branched(
    gamma, k, n, r_max=1.0, *, rewards: str = "given", measured: str = "current"
) -> Coefficients:
    """Branches of n chunks (README, corollary 2). ε_m is per chunk for given and decoded rewards,
    per step for accumulated ones. For measured="current":

    given:       2RΓ^(n+1)/(1−Γ)² ε_π + 2RΓ(1−Γ^n)/(1−Γ)² ε_m
    accumulated: the same ε_π, 2 r_max Σ_i Γ^i Σ_{j<k} γ^j (min(i, n) k + j) ε_m: k times the
                 given-reward factor, and the error made inside the last chunk
    decoded:     2 r_max γ^(k−1) [Γ^n/(1−Γ)² ε_π + (1−Γ^n)/(1−Γ)² ε_m]

    measured="data" changes the ε_π factor alone: 2RΓ/(1−Γ)², 2 r_max γ/((1−γ)(1−Γ)) and
    2 r_max γ^(k−1)/(1−Γ)², whatever n.
    """
    checks.check_branch(n)
    return _corrected(gamma, k, n, r_max, rewards, measured, per_step=rewards == "accumulated")


def _corrected(gamma, k, n, r_max, rewards, measured, *, per_step) -> Coefficients:
    _check(gamma, k, r_max)
    checks.check_choice("rewards", rewards, REWARDS)
    checks.check_choice("measured", measured, MEASURED)
    discount = chunk_discount(gamma, k)
    k = np.asarray(k, np.float64)[()]
    # Σ_i Γ^i min(i, n) = (Γ − Γ^(n+1))/(1−Γ)²  and  Σ_i Γ^i max(i − n, 0) = Γ^(n+1)/(1−Γ)².
    after_branch = np.power(discount, n + 1.0) / (1 - discount) ** 2
    all_chunks = discount / (1 - discount) ** 2
    in_branch = discount * (1 - np.power(discount, n)) / (1 - discount) ** 2
    steps = k if per_step else 1.0
    if rewards == "decoded":
        scale = 2 * r_max * np.power(gamma, k - 1)
        # One transition more than a given reward sees: divide the chunk sums by Γ.
        after_branch = np.power(discount, n) / (1 - discount) ** 2
        all_chunks = 1 / (1 - discount) ** 2
        in_branch = (1 - np.power(discount, n)) / (1 - discount) ** 2
        eps_pi = after_branch if measured == "current" else all_chunks + 0 * after_branch
        return Coefficients(scale * eps_pi, scale * steps * in_branch)
    scale = 2 * chunk_reward_bound(gamma, k, r_max)
    eps_pi = scale * (after_branch if measured == "current" else all_chunks + 0 * after_branch)
    eps_m = scale * steps * in_branch
    if rewards == "accumulated":
        eps_m = eps_m + 2 * r_max * _interior_steps(gamma, k) / (1 - discount)
        if measured == "data":
            # After its first step an imagined chunk has also had the chance to meet an action
            # that the data policy does not take.
            eps_pi = eps_pi + 2 * r_max * (gamma - discount) / ((1 - gamma) * (1 - discount))
    return Coefficients(eps_pi, eps_m)


def _interior_steps(gamma, k):
    """Σ_{j<k} j γ^j, the discounted number of model steps before the rewards of one chunk."""
    last = np.power(gamma, k - 1)
    return gamma * (1 - last * (k - (k - 1) * gamma)) / (1 - gamma) ** 2


def saturating_branched(eps_pi, eps_m, gamma, k, n, r_max=1.0):
    """Given rewards, *worst-case* ε_π and chunk ε_m: the bound that never exceeds the range of
    returns (README, corollary 3),

    2R Σ_i Γ^i [1 − (1−ε_π)^max(i−n, 0) (1−ε_m)^min(i, n)].
    """
    _check(gamma, k, r_max)
    checks.check_branch(n)
    checks.check_error("eps_pi", eps_pi)
    checks.check_error("eps_m", eps_m)
    discount = chunk_discount(gamma, k)
    stay = discount * (1 - np.asarray(eps_m, np.float64))
    inside = (1 - np.power(stay, n)) / (1 - stay)
    outside = np.power(stay, n) / (1 - discount * (1 - np.asarray(eps_pi, np.float64)))
    scale = 2 * chunk_reward_bound(gamma, k, r_max)
    return (scale * (1 / (1 - discount) - inside - outside))[()]
