from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.theory import claims, families, report, search
from tests.experiments.theory import problems

FIXTURES = Path(__file__).parents[2] / "fixtures" / "theory"
COUNTEREXAMPLES = sorted(FIXTURES.glob("*.json"))
PROVED = [one.name for one in claims.CLAIMS if one.holds]
_parts = jax.jit(claims.gaps_and_errors, static_argnames="n")


def ratios(problem, gamma: float, k: int, n: int) -> dict[str, float]:
    """gap / bound by claim, the bound enlarged by what rounding and truncation could add."""
    evaluation = problems.evaluate(problem, gamma, k)
    gaps, errors = map(np.asarray, _parts(evaluation, n=n))
    limits = (claims.coefficient_table(gamma, k, n) * errors).sum(-1)
    slack = claims.truncation(gamma, k, problems.TIMES) + 1e-12 / (1 - gamma)
    return dict(zip(claims.NAMES, gaps / (limits + slack)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(tuple(families.FAMILIES)), st.floats(0.05, 0.97),
    st.sampled_from((0, 1, 2, 4)),
)  # fmt: skip
def test_no_proved_bound_is_exceeded(seed, family, gamma, n):
    found = ratios(problems.random_problem(seed, family), gamma, 2, n)
    assert max(found[name] for name in PROVED) <= 1 + 1e-9


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-6, 0.5), st.floats(0.05, 0.97), st.sampled_from((0, 1, 2, 4)))
def test_no_proved_bound_is_exceeded_by_the_worked_examples(epsilon, gamma, n):
    examples = (
        problems.unseen_chunk(epsilon), problems.detour(), problems.late_fall(epsilon)
    )  # fmt: skip
    for example in examples:
        found = ratios(example, gamma, 2, n)
        assert max(found[name] for name in PROVED) <= 1 + 1e-9


def test_leak_exceeds_the_published_full_horizon_bound():
    found = ratios(problems.leak(1e-6, 10), 0.99, 10, 2)
    # Σ_{j<k} γ^j / (k γ^(k−1)) = 9.5618 / (10 · 0.91352)
    assert found["published_full_accumulated"] == pytest.approx(1.04670, abs=2e-4)
    assert found["published_full_given"] == pytest.approx(1, abs=2e-4)
    assert found["corrected_full_accumulated"] == pytest.approx(1, abs=2e-4)
    assert found["corrected_branch_given"] == pytest.approx(1, abs=2e-4)
    assert found["published_branch_given"] == pytest.approx(344.4578 / 400, abs=2e-4)
    assert found["published_branch_accumulated"] == pytest.approx(432.7998 / 400, abs=2e-4)


def test_unseen_chunk_exceeds_the_published_branch_under_the_data_policy():
    # By Γ^(1−n): Γ = 0.81, n = 4.
    found = ratios(problems.unseen_chunk(1e-6), 0.9, 2, 4)
    assert found["published_branch_given_data"] == pytest.approx(0.81**-3, rel=1e-3)
    assert found["corrected_branch_given_data"] == pytest.approx(1, abs=1e-3)
    assert ratios(problems.unseen_chunk(1e-6), 0.9, 2, 1)["published_branch_given_data"] <= 1


def test_detour_makes_the_published_branch_bound_meaningless():
    found = ratios(problems.detour(), 0.9, 2, 2)
    assert found["published_branch_accumulated"] > 1e9
    assert found["corrected_branch_accumulated"] <= 1


def test_late_fall_is_as_bad_as_the_bound():
    found = ratios(problems.late_fall(1e-6), 0.9, 2, 4)
    assert found["corrected_branch_given"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("path", COUNTEREXAMPLES, ids=lambda path: path.stem)
def test_saved_counterexample_still_exceeds(path):
    found, problem = report.load_counterexample(path)
    gamma, k, n = found["gamma"], found["k"], found["n"]
    measured = ratios(problem, gamma, k, n)
    assert not claims.claim(found["claim"]).holds
    assert measured[found["claim"]] > 1.01
    assert max(measured[name] for name in PROVED) <= 1 + 1e-9


def test_every_false_claim_has_a_counterexample():
    false = {one.name for one in claims.CLAIMS if not one.holds}
    assert {path.stem for path in COUNTEREXAMPLES} == false


def test_adversary_finds_what_random_search_does_not():
    # Sizes are those of test_compounding_error.py: the programs are compiled once for both.
    sizes = dict(states=3, actions=2, k=2)
    random = search.check_random(
        jax.random.key(0), problems=50, batch=10, ns=(1, 2), gamma=0.9, **sizes
    )
    assert random.ratios.shape == (50, 2, len(claims.CLAIMS))
    assert np.bincount(random.family).tolist() == [10] * 5
    found = search.climb(jax.random.key(0), gammas=(0.5,), n=2, restarts=3, steps=150, **sizes)
    by_name = dict(zip(claims.NAMES, found.ratio))
    worst_random = dict(zip(claims.NAMES, random.ratios.max((0, 1))))
    broken = "published_full_accumulated"
    assert by_name[broken] > 1.1
    assert worst_random[broken] < 1
    assert max(by_name[name] for name in PROVED) <= 1 + 1e-9
    assert by_name["corrected_branch_given"] > 0.9
    # The problem it returns has the ratio it claims.
    index = claims.NAMES.index(broken)
    problem = jax.tree.map(lambda leaf: leaf[index], found.problem)
    measured = ratios(problem, 0.5, 2, 2)[broken]
    assert measured == pytest.approx(found.ratio[index], rel=1e-4)


def test_unknown_claim_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'published_full_given'"):
        claims.claim("publshed_full_given")
