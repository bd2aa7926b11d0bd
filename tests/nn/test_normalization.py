from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.nn.normalization import NormStats, normalize, unnormalize

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "norm" / "norm.npz")


def golden_stats(key):
    return NormStats(*(GOLDEN[f"stats/{key}/{field}"] for field in ("mean", "std", "q01", "q99")))


@pytest.mark.parametrize("key", ["state", "actions"])
@pytest.mark.parametrize("mode", ["quantile", "zscore"])
def test_agrees_with_openpi(key, mode):
    stats = golden_stats(key)
    result = normalize(GOLDEN[f"raw/{key}"], stats, mode)
    np.testing.assert_allclose(result, GOLDEN[f"{mode}/{key}"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        unnormalize(result, stats, mode), GOLDEN[f"raw/{key}"], rtol=1e-6, atol=1e-6
    )


def test_unnormalize_agrees_with_openpi():
    result = unnormalize(GOLDEN["quantile/state"], golden_stats("state"), "quantile")
    np.testing.assert_allclose(result, GOLDEN["unnorm_quantile/state"], rtol=1e-6, atol=1e-6)


def test_hand_derived():
    stats = NormStats(*(np.array([v], np.float32) for v in (1.0, 2.0, -3.0, 5.0)))
    x = np.array([[-3.0], [1.0], [5.0], [9.0]], np.float32)
    # The quantile interval [-3, 5] has centre 1 and half width 4 (+ 5e-7).
    np.testing.assert_allclose(
        normalize(x, stats, "quantile"), [[-1.0], [0.0], [1.0], [2.0]], atol=1e-6
    )
    np.testing.assert_allclose(
        normalize(x, stats, "zscore"), [[-2.0], [0.0], [2.0], [4.0]], atol=3e-6
    )


def test_constant_dimension_stays_finite():
    stats = NormStats(*(np.array([v], np.float32) for v in (0.5, 0.0, 0.5, 0.5)))
    x = np.full((2, 1), 0.5, np.float32)
    for mode in ("quantile", "zscore"):
        assert np.isfinite(normalize(x, stats, mode)).all()
        np.testing.assert_allclose(unnormalize(normalize(x, stats, mode), stats, mode), x)


def test_traced_and_dtype():
    stats = golden_stats("actions")
    x = jnp.asarray(GOLDEN["raw/actions"])
    result = jax.jit(lambda x, s: normalize(x, s, "quantile"))(x, stats)
    np.testing.assert_allclose(result, GOLDEN["quantile/actions"], rtol=1e-6, atol=2e-6)
    assert normalize(x.astype(jnp.bfloat16), stats, "zscore").dtype == jnp.bfloat16


def test_bad_input():
    stats = golden_stats("state")
    with pytest.raises(ValueError, match="last axis must match"):
        normalize(np.zeros((2, 3), np.float32), stats, "zscore")
    with pytest.raises(ValueError, match="unknown normalisation mode"):
        normalize(np.zeros((2, 7), np.float32), stats, "minmax")
