import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import theory
from experiments.theory import bounds
from experiments.theory.branch_length import BOUNDS, branch_length_curve

ERRORS = st.floats(0.0, 1.0)


@settings(max_examples=50, deadline=None)
@given(ERRORS, ERRORS, st.floats(0.0, 0.99), st.integers(1, 10))
def test_constant_errors_give_the_coefficients(eps_pi, eps_m, gamma, k):
    n = np.arange(9)
    curve = {
        bound: branch_length_curve(eps_pi, eps_m, gamma, k, n_max=8, bound=bound)
        for bound in BOUNDS
    }
    corrected = bounds.corrected_branched(gamma, k, n).bound(eps_pi, eps_m)
    np.testing.assert_allclose(curve["corrected"], corrected, rtol=1e-9, atol=1e-9)
    published = bounds.branched(gamma, k, n).bound(eps_pi, eps_m)
    np.testing.assert_allclose(curve["published"], published, rtol=1e-9, atol=1e-9)
    saturating = bounds.saturating_branched(eps_pi, eps_m, gamma, k, n)
    np.testing.assert_allclose(curve["saturating"], saturating, rtol=1e-9, atol=1e-7)
    assert np.all(curve["corrected"] <= curve["published"] * (1 + 1e-9) + 1e-9)
    assert np.all(curve["saturating"] <= curve["corrected"] * (1 + 1e-9) + 1e-7)


def test_curve_by_hand():
    # γ = ½, k = 1, Γ = ½, 2R = 2: B = 2[½^(n+1)/¼ · 0.1 + Σ_{j<n} ½^(j+1)/½ · ε_m(j)].
    curve = branch_length_curve(0.1, [0.01, 0.05, 0.3], 0.5, 1)
    np.testing.assert_allclose(curve, [0.4, 0.22, 0.17, 0.27], atol=1e-12)
    # ε_π may depend on the branch length.
    curve = branch_length_curve([0.1, 0.2], [0.01], 0.5, 1)
    np.testing.assert_allclose(curve, [0.4, 0.42], atol=1e-12)


def test_stops_where_the_model_errs_more_than_the_data_policy():
    growing = [0.01, 0.03, 0.09, 0.27]
    assert theory.optimal_branch_length(0.05, growing, 0.99, 10) == 2
    assert theory.optimal_branch_length(0.5, growing, 0.99, 10) == 4
    assert theory.optimal_branch_length(0.001, growing, 0.99, 10) == 1
    assert theory.optimal_branch_length(0.001, growing, 0.99, 10, n_min=0) == 0


@settings(max_examples=50, deadline=None)
@given(ERRORS, st.lists(ERRORS, min_size=1, max_size=12), st.floats(0.3, 0.98), st.integers(1, 4))
def test_stopping_rule_is_the_minimum(eps_pi, eps_m, gamma, k):
    eps_m = sorted(eps_m)
    found = theory.optimal_branch_length(eps_pi, eps_m, gamma, k, n_min=0)
    curve = branch_length_curve(eps_pi, eps_m, gamma, k)
    assert curve[found] <= curve.min() + 1e-9 * max(curve.max(), 1)
    rule = int(np.searchsorted(eps_m, eps_pi))
    assert curve[rule] <= curve.min() + 1e-9 * max(curve.max(), 1)


def test_constant_errors_have_no_interior_optimum():
    for bound in ("corrected", "saturating"):
        best = [
            theory.optimal_branch_length(eps_pi, 0.05, 0.99, 10, n_max=30, bound=bound)
            for eps_pi in (0.01, 0.04, 0.06, 0.5)
        ]
        assert best == [1, 1, 30, 30]
    # Published: one more chunk pays while Γ^n ε_π > ε_m, and 0.99^60 = 0.547, 0.99^70 = 0.495.
    assert theory.optimal_branch_length(0.1, 0.05, 0.99, 10, n_max=30, bound="published") == 7
    # Equal errors: nothing is gained by imagining, so the shortest branch.
    assert theory.optimal_branch_length(0.05, 0.05, 0.99, 10) == 1
    assert theory.optimal_branch_length(0.1, 0.0, 0.99, 10) == 52


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0.1, 0.1, 1.0, 10), {}, r"gamma=1\.0"),
        ((0.1, 0.1, 0.9, 0), {}, "k=0"),
        ((-0.1, 0.1, 0.9, 2), {}, r"eps_pi=-0\.1"),
        ((0.1, [0.1, 1.2], 0.9, 2), {}, "eps_m"),
        ((0.1, [0.1, 0.2], 0.9, 2), {"n_max": 5}, "eps_m must be a number or have 5 entries"),
        ((0.1, 0.1, 0.9, 2), {"n_max": -1}, "n_max=-1"),
        ((0.1, 0.1, 0.9, 2), {"n_max": 3, "n_min": 4}, "n_min must not exceed n_max=3"),
        ((0.1, 0.1, 0.9, 2), {"bound": "publshed"}, "did you mean 'published'"),
        ((0.1, 0.1, 0.9, 2), {"r_max": -1.0}, r"r_max=-1\.0"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        theory.optimal_branch_length(*arguments, **options)
