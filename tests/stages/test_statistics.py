import numpy as np
import pytest

from mbpo_jax.stages.statistics import (
    mcnemar_exact,
    newcombe_interval,
    wilson_interval,
    within_groups,
)


def test_wilson_interval_of_a_half():
    # p = 1/2, n = 100, z² = 3.841459: centre 1/2, half width z·sqrt(1/4n + z²/4n²)/(1 + z²/n)
    # = 1.959964·sqrt(0.0025 + 0.0000960365)/1.03841459 = 0.0961685
    np.testing.assert_allclose(wilson_interval(50, 100), (0.4038315, 0.5961685), atol=1e-6)


def test_wilson_interval_at_the_ends():
    # k = 0: upper end z²/(n + z²) = 3.841459/13.841459
    np.testing.assert_allclose(wilson_interval(0, 10), (0.0, 0.2775328), atol=1e-6)
    np.testing.assert_allclose(wilson_interval(10, 10), (0.7224672, 1.0), atol=1e-6)


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="0 trials"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="3 successes of 2 trials"):
        wilson_interval(3, 2)


def test_newcombe_intervals_as_published():
    # Newcombe 1998, table II, method 10: examples (a), (e) and (h)
    for first, second, expected in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ):
        np.testing.assert_allclose(newcombe_interval(first, second), expected, atol=5e-5)


def test_mcnemar_by_hand():
    # 1 against 5 discordant pairs: 2·(C(6,0) + C(6,1))/2^6 = 14/64
    assert mcnemar_exact(1, 5) == pytest.approx(14 / 64, abs=1e-12)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(3, 3) == 1.0


def test_correlation_within_groups_by_hand():
    # Deviations: x (-1, 0, 1) and (-1, 1, 0), y (-1, 0, 1) and (1, 0, -1); 2 - 1 over sqrt(4 · 4).
    # Between the groups, 100 apart in x and -100 in y, it would be -1.
    x, y = [0, 1, 2, 100, 102, 101], [0, 1, 2, -99, -100, -101]
    found = within_groups(np.array(x), np.array(y), 3)
    assert found["correlation"] == pytest.approx(1 / 4, abs=1e-6)
    # A bootstrap sample of two groups is one of them twice (1 or -1/2) or both.
    assert found["interval"] == pytest.approx([-0.5, 1.0], abs=1e-6)
    assert within_groups(np.ones(6), np.array(y), 3)["correlation"] == 0.0
