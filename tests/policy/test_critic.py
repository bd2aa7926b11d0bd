import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.policy import critic
from mbpo_jax.policy.config import CriticConfig
from mbpo_jax.policy.critic import fit_critic
from mbpo_jax.stages.fit_value import auc, chunk_returns


def test_returns_by_hand():
    # Chunks of 10 steps, γ = 0.5 per chunk, w = 0.8; 1, 10, 11 and 25 steps left are 1, 1, 2 and 3
    # chunks: 0.8, 0.8, 0.8 · 0.5, 0.8 · 0.25; nothing where the episode fails.
    left, success = np.array([1, 10, 11, 25, 25]), np.array([1, 1, 1, 1, 0], bool)
    np.testing.assert_allclose(
        chunk_returns(left, success, 10, 0.5, 0.8), [0.8, 0.8, 0.4, 0.2, 0.0], atol=1e-6
    )


def test_auc_by_hand():
    # Positives 0.9 and 0.5, negatives 0.5 and 0.1: of four pairs three are ordered, one is tied.
    np.testing.assert_allclose(auc([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0]), 3.5 / 4)
    assert np.isnan(auc([0.1, 0.2], [1, 1]))


def test_a_critic_learns_returns_from_raw_features():
    rng = np.random.default_rng(0)
    features = 5.0 + 100.0 * rng.normal(size=(800, 6)).astype(np.float32)
    returns = ((features[:, 0] - 5) / 100 > 0).astype(np.float32)
    fresh = critic.init(jax.random.key(0), 6, CriticConfig(widths=(32,)))
    fitted = fit_critic(fresh, features[:600], returns[:600], jax.random.key(1), steps=400)
    value = critic.apply(fitted, jnp.asarray(features[600:]))[0]
    assert auc(value, returns[600:]) > 0.97
    assert jnp.square(value - returns[600:]).mean() < 0.1
