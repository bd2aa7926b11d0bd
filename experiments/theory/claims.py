"""Every bound under test, as data: which gap it bounds, with which errors and which coefficients.

`published` claims are read off the papers under every definition that their text allows;
`corrected` ones are proved in README.md. A claim's ratio is gap / bound: above one, it is false.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from experiments.theory import bounds, checks
from experiments.theory.tabular import Evaluation


@dataclasses.dataclass(frozen=True)
class Claim:
    """name: an identifier; statement: one line for reports; family: published or corrected;
    holds: what README.md proves about it; coefficients(gamma, k, n, r_max); gap(evaluation, n) ≥ 0;
    errors(evaluation, n) = (ε_π, ε_m) as the claim measures them."""

    name: str
    statement: str
    family: str
    holds: bool
    coefficients: Callable
    gap: Callable
    errors: Callable


def _full(kind):
    truth = "true_decoded" if kind == "full_decoded" else "true"
    return lambda e, n: jnp.abs(getattr(e, truth) - getattr(e, kind))


def _branch(kind):
    truth = "true_decoded" if kind == "branch_decoded" else "true"
    return lambda e, n: jnp.abs(getattr(e, truth) - getattr(e, kind)[n])


def _step_data(e, n):
    return e.eps_pi_worst, e.step_error.data


def _chunk(measured):
    def errors(e, n):
        if measured == "branch":
            return e.eps_pi_worst, e.chunk_error.branch[: max(n, 1)].max()
        return e.eps_pi_worst, getattr(e.chunk_error, measured)

    return errors


def _composed_branch(e, n):
    return e.eps_pi_worst, e.composed_error.branch[: max(n, 1)].max()


def _step_branch(e, n):
    # The chunk after the last model transition is imagined inside too: positions 0, …, n.
    return e.eps_pi_worst, e.step_error.branch[: n + 1].max()


def _step_current(e, n):
    return e.eps_pi_worst, e.step_error.current


def _expected_pi(errors):
    return lambda e, n: (e.eps_pi_data, errors(e, n)[1])


def _published_full(gamma, k, n, r_max):
    return bounds.full_horizon(gamma, k, r_max)


def _published_branch(gamma, k, n, r_max):
    return bounds.branched(gamma, k, n, r_max)


def _mbpo_data(gamma, k, n, r_max):
    chunk_r_max = bounds.chunk_reward_bound(gamma, k, r_max)
    return bounds.mbpo_branched_data(bounds.chunk_discount(gamma, k), n, chunk_r_max)


def _corrected_full(rewards):
    return lambda gamma, k, n, r_max: bounds.corrected_full_horizon(
        gamma, k, r_max, rewards=rewards
    )


def _corrected_branch(rewards, measured="current"):
    return lambda gamma, k, n, r_max: bounds.corrected_branched(
        gamma, k, n, r_max, rewards=rewards, measured=measured
    )


def _published(name, statement, holds, coefficients, gap, errors):
    return Claim(name, statement, "published", holds, coefficients, gap, errors)


def _corrected(name, statement, coefficients, gap, errors):
    return Claim(name, statement, "corrected", True, coefficients, gap, errors)


CLAIMS = (
    _published(
        "published_full_given",
        "published full horizon; chunk rewards given; ε_m per step, data policy",
        True,
        _published_full,
        _full("full_given"),
        _step_data,
    ),
    _published(
        "published_full_accumulated",
        "published full horizon; step rewards accumulated in the model; ε_m per step, data policy",
        False,
        _published_full,
        _full("full_accumulated"),
        _step_data,
    ),
    _published(
        "published_full_decoded",
        "published full horizon; reward decoded from the imagined state; ε_m per step, data policy",
        False,
        _published_full,
        _full("full_decoded"),
        _step_data,
    ),
    _published(
        "published_branch_given",
        "published branch; chunk rewards given; ε_m per chunk, along the branch",
        True,
        _published_branch,
        _branch("branch_given"),
        _chunk("branch"),
    ),
    _published(
        "published_branch_given_on_policy",
        "published branch; chunk rewards given; ε_m per chunk, on the current policy's states",
        True,
        _published_branch,
        _branch("branch_given"),
        _chunk("current"),
    ),
    _published(
        "published_branch_given_data",
        "published branch; chunk rewards given; ε_m per chunk, under the data policy",
        False,
        _published_branch,
        _branch("branch_given"),
        _chunk("data"),
    ),
    _published(
        "published_branch_decoded",
        "published branch; reward decoded from the imagined state; ε_m per chunk, along the branch",
        True,
        _published_branch,
        _branch("branch_decoded"),
        _chunk("branch"),
    ),
    _published(
        "published_branch_accumulated",
        "published branch; step rewards accumulated in the model; ε_m of the chunk's end state",
        False,
        _published_branch,
        _branch("branch_accumulated"),
        _composed_branch,
    ),
    _published(
        "mbpo_4.2_given_data",
        "MBPO theorem 4.2 on the chunk MDP; rewards given; ε_m per chunk, data policy",
        True,
        _mbpo_data,
        _branch("branch_given"),
        _chunk("data"),
    ),
    _corrected(
        "corrected_full_given",
        "corrected full horizon; chunk rewards given; ε_m per step, data policy",
        _corrected_full("given"),
        _full("full_given"),
        _expected_pi(_step_data),
    ),
    _corrected(
        "corrected_full_accumulated",
        "corrected full horizon; step rewards accumulated; ε_m per step, data policy",
        _corrected_full("accumulated"),
        _full("full_accumulated"),
        _expected_pi(_step_data),
    ),
    _corrected(
        "corrected_full_decoded",
        "corrected full horizon; reward decoded; ε_m per step, data policy",
        _corrected_full("decoded"),
        _full("full_decoded"),
        _expected_pi(_step_data),
    ),
    _corrected(
        "corrected_branch_given",
        "corrected branch; chunk rewards given; ε_m per chunk, along the branch",
        _corrected_branch("given"),
        _branch("branch_given"),
        _expected_pi(_chunk("branch")),
    ),
    _corrected(
        "corrected_branch_given_on_policy",
        "corrected branch; chunk rewards given; ε_m per chunk, on the current policy's states",
        _corrected_branch("given"),
        _branch("branch_given"),
        _expected_pi(_chunk("current")),
    ),
    _corrected(
        "corrected_branch_given_data",
        "corrected branch; chunk rewards given; ε_m per chunk, under the data policy",
        _corrected_branch("given", "data"),
        _branch("branch_given"),
        _expected_pi(_chunk("data")),
    ),
    _corrected(
        "corrected_branch_decoded",
        "corrected branch; reward decoded; ε_m per chunk, along the branch",
        _corrected_branch("decoded"),
        _branch("branch_decoded"),
        _expected_pi(_chunk("branch")),
    ),
    _corrected(
        "corrected_branch_accumulated",
        "corrected branch; step rewards accumulated; ε_m per step, along the branch",
        _corrected_branch("accumulated"),
        _branch("branch_accumulated"),
        _expected_pi(_step_branch),
    ),
    _corrected(
        "corrected_branch_accumulated_on_policy",
        "corrected branch; step rewards accumulated; ε_m per step, on the current policy's states",
        _corrected_branch("accumulated"),
        _branch("branch_accumulated"),
        _expected_pi(_step_current),
    ),
    _corrected(
        "corrected_branch_accumulated_data",
        "corrected branch; step rewards accumulated; ε_m per step, under the data policy",
        _corrected_branch("accumulated", "data"),
        _branch("branch_accumulated"),
        _expected_pi(_step_data),
    ),
)
NAMES = tuple(claim.name for claim in CLAIMS)


def claim(name: str) -> Claim:
    """The claim called `name`; ValueError naming the nearest known one otherwise."""
    checks.check_choice("claim", name, NAMES)
    return CLAIMS[NAMES.index(name)]


def gaps_and_errors(evaluation: Evaluation, n: int):
    """Gaps [C] and (ε_π, ε_m) [C, 2] of all `CLAIMS` for branches of n chunks."""
    gaps = jnp.stack([one.gap(evaluation, n) for one in CLAIMS])
    errors = jnp.stack([jnp.stack(one.errors(evaluation, n)) for one in CLAIMS])
    return gaps, errors


def coefficient_table(gamma: float, k: int, n: int, r_max: float = 1.0) -> np.ndarray:
    """Coefficients [C, 2] of (ε_π, ε_m) of all `CLAIMS`."""
    return np.array([one.coefficients(gamma, k, n, r_max) for one in CLAIMS], np.float64)


def truncation(gamma: float, k: int, times: int, r_max: float = 1.0) -> float:
    """How much a gap may exceed a true bound because "worst over time" stops at `times` chunks."""
    return 2 * r_max * gamma ** (k * times) / (1 - gamma)
