import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.theory import bounds

GAMMAS = st.floats(0.0, 0.995)


def test_case_study_to_one_decimal():
    full, branch = bounds.full_horizon(0.99, 10), bounds.branched(0.99, 10, 2)
    assert (round(full.eps_pi, 1), round(full.eps_m, 1)) == (4183.3, 18916.6)
    assert (round(branch.eps_pi, 1), round(branch.eps_m, 1)) == (1710.8, 400.0)
    assert round(bounds.branched(0.99, 10, 1).eps_pi, 1) == 1891.7
    assert round(bounds.branched(0.99, 10, 4).eps_pi, 1) == 1399.3


def test_corrected_case_study():
    full = bounds.corrected_full_horizon(0.99, 10)
    assert full.eps_m == pytest.approx(2 * 0.99 / 0.01**2, rel=1e-12)
    assert full.eps_pi == pytest.approx(2 * 0.99 / (0.01 * (1 - 0.99**10)), rel=1e-12)
    assert round(bounds.corrected_branched(0.99, 10, 2).eps_m, 1) == 344.5


def test_hand_derived_at_one_half():
    # γ = ½, k = 2: Γ = ¼, R = (1 − ¼)/(1 − ½) = 3/2.
    assert bounds.chunk_reward_bound(0.5, 2) == pytest.approx(1.5, abs=1e-12)
    # 2/(1−γ) = 4; Γ/(1−Γ) = ⅓: ε_π 4(⅔ + 2), ε_m 4 · 2 · ⅓.
    assert bounds.full_horizon(0.5, 2) == pytest.approx((32 / 3, 8 / 3), abs=1e-12)
    # n = 1: 4(1/16/(3/4) + ¼) = 4/3 and 4.
    assert bounds.branched(0.5, 2, 1) == pytest.approx((4 / 3, 4.0), abs=1e-12)
    # given: 3 · (1/16)/(9/16) and 3 · ¼ · ¾/(9/16).
    assert bounds.corrected_branched(0.5, 2, 1) == pytest.approx((1 / 3, 1.0), abs=1e-12)
    # accumulated: twice that, plus 2 · (0 + ½)/(1 − ¼).
    accumulated = bounds.corrected_branched(0.5, 2, 1, rewards="accumulated")
    assert accumulated == pytest.approx((1 / 3, 2 + 4 / 3), abs=1e-12)
    # decoded: 2 · ½ · [¼, ¾]/(9/16).
    decoded = bounds.corrected_branched(0.5, 2, 1, rewards="decoded")
    assert decoded == pytest.approx((4 / 9, 4 / 3), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(GAMMAS, st.integers(1, 12), st.integers(0, 8), st.floats(0.1, 5.0))
def test_coefficients_are_the_sums_of_the_proof(gamma, k, n, r_max):
    chunks = max(2, math.ceil(-50 / (k * math.log(gamma)))) if gamma > 0 else 2
    i, j = np.arange(chunks)[:, None], np.arange(k)[None, :]
    weight = 2 * r_max * gamma ** (i * k + j)
    inside, outside = np.minimum(i, n), np.maximum(i - n, 0)

    def close(coefficients, eps_pi, eps_m):
        assert coefficients.eps_pi == pytest.approx(eps_pi, rel=1e-9, abs=1e-9)
        assert coefficients.eps_m == pytest.approx(eps_m, rel=1e-9, abs=1e-9)

    off, model = (weight * outside).sum(), (weight * inside).sum()
    steps = (weight * (inside * k + j)).sum()
    close(bounds.corrected_branched(gamma, k, n, r_max), off, model)
    close(bounds.corrected_branched(gamma, k, n, r_max, rewards="accumulated"), off, steps)
    data = dict(r_max=r_max, measured="data")
    close(bounds.corrected_branched(gamma, k, n, **data), (weight * i).sum(), model)
    shifted = (weight * (i + (j > 0))).sum()
    close(bounds.corrected_branched(gamma, k, n, **data, rewards="accumulated"), shifted, steps)
    end = weight[:, -1:]
    close(
        bounds.corrected_branched(gamma, k, n, r_max, rewards="decoded"),
        (end * np.maximum(i + 1 - n, 0)).sum(),
        (end * np.minimum(i + 1, n)).sum(),
    )
    full = bounds.corrected_full_horizon(gamma, k, r_max, rewards="accumulated")
    close(full, shifted, (weight * (i * k + j)).sum())
    saturating = (weight * (1 - 0.9**outside * 0.8**inside)).sum()
    value = bounds.saturating_branched(0.1, 0.2, gamma, k, n, r_max)
    assert value == pytest.approx(saturating, rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(GAMMAS, st.integers(0, 9))
def test_one_step_chunks_give_mbpo(gamma, n):
    assert bounds.full_horizon(gamma, 1) == pytest.approx(bounds.mbpo_full_horizon(gamma))
    assert bounds.branched(gamma, 1, n) == pytest.approx(bounds.mbpo_branched_current(gamma, n))


def test_mbpo_as_printed():
    # γ = ½, n = 2, r_max = 3: theorem 4.1 has 2γr/(1−γ)² = 12 and 4r/(1−γ) = 24.
    assert bounds.mbpo_full_horizon(0.5, 3.0) == pytest.approx((48.0, 12.0))
    # 4.3: 6[(1/8)/(1/4) + (1/4)/(1/2)] = 6 and 6 · 2/(1/2) = 24.
    assert bounds.mbpo_branched_current(0.5, 2, 3.0) == pytest.approx((6.0, 24.0))
    # 4.2 adds 6[2/(1/2) + 2 · 2/(1/2)] = 72 to ε_π.
    assert bounds.mbpo_branched_data(0.5, 2, 3.0) == pytest.approx((78.0, 24.0))


@settings(max_examples=60, deadline=None)
@given(GAMMAS, st.integers(1, 20), st.integers(0, 30))
def test_published_constants_that_hold_are_not_below_the_proved_ones(gamma, k, n):
    def at_most(small, large):
        assert small.eps_pi <= large.eps_pi * (1 + 1e-12)
        assert small.eps_m <= large.eps_m * (1 + 1e-12)

    at_most(bounds.corrected_branched(gamma, k, n), bounds.branched(gamma, k, n))
    decoded = bounds.corrected_branched(gamma, k, n, rewards="decoded")
    at_most(decoded, bounds.branched(gamma, k, n))
    given_rewards = bounds.corrected_full_horizon(gamma, k, rewards="given")
    at_most(given_rewards, bounds.full_horizon(gamma, k))
    data = bounds.corrected_branched(gamma, k, n, measured="data")
    discount, chunk_r_max = gamma**k, bounds.chunk_reward_bound(gamma, k)
    at_most(data, bounds.mbpo_branched_data(discount, n, chunk_r_max))


def test_limits():
    for rewards in bounds.REWARDS:
        endless = bounds.corrected_branched(0.9, 3, np.inf, rewards=rewards)
        long = bounds.corrected_branched(0.9, 3, 400, rewards=rewards)
        assert endless == pytest.approx(long, abs=1e-9)
        assert endless.eps_pi == 0
    published = bounds.branched(0.9, 3, np.inf)
    assert (published.eps_pi, published.eps_m) == (0, np.inf)
    assert published.bound(0.5, 0.0) == 0
    assert published.bound(0.5, 0.1) == np.inf
    none = bounds.corrected_branched(0.9, 3, 0)
    assert none.eps_m == 0
    assert none.eps_pi == pytest.approx(
        bounds.corrected_branched(0.9, 3, 0, measured="data").eps_pi
    )
    # γ = 0 sees one step: nothing has gone wrong before it.
    assert bounds.corrected_full_horizon(0.0, 3) == (0.0, 0.0)
    assert bounds.corrected_branched(0.0, 1, 1, rewards="decoded") == (0.0, 2.0)
    assert bounds.saturating_branched(1.0, 1.0, 0.9, 2, 3) <= 2 / (1 - 0.9)


def test_arrays_broadcast():
    n = np.arange(4)
    together = bounds.corrected_branched(0.9, 3, n)
    apart = [bounds.corrected_branched(0.9, 3, int(one)) for one in n]
    np.testing.assert_allclose(together.eps_m, [one.eps_m for one in apart])
    np.testing.assert_allclose(together.bound(0.1, 0.2), [one.bound(0.1, 0.2) for one in apart])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (bounds.full_horizon, (1.0, 10), r"gamma must lie in \[0, 1\), got gamma=1.0"),
        (bounds.full_horizon, (-0.1, 10), "gamma=-0.1"),
        (bounds.full_horizon, (math.nan, 10), "gamma=nan"),
        (bounds.full_horizon, (0.9, 0), "got k=0"),
        (bounds.branched, (0.9, 2.5, 1), "got k=2.5"),
        (bounds.branched, (0.9, 2, -1), "got n=-1"),
        (bounds.branched, (0.9, 2, 1, -1.0), "got r_max=-1.0"),
        (bounds.mbpo_branched_current, (0.9, -2), "got n=-2"),
        (bounds.saturating_branched, (-0.1, 0.1, 0.9, 2, 1), "eps_pi=-0.1"),
        (bounds.saturating_branched, (0.1, 1.5, 0.9, 2, 1), "eps_m=1.5"),
        (bounds.Coefficients(1.0, 1.0).bound, (0.1, -0.5), "eps_m=-0.5"),
    ],
)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_unknown_choice_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'accumulated'"):
        bounds.corrected_full_horizon(0.9, 2, rewards="acumulated")


def test_every_bound_states_its_source():
    for name, function in inspect.getmembers(bounds, inspect.isfunction):
        if function.__module__ == bounds.__name__ and not name.startswith(("_", "chunk")):
            assert any(s in function.__doc__ for s in ("arXiv", "MBPO theorem", "README")), name
