import jax
import ml_collections
import numpy as np

from mbpo_jax.stages.siblings import expected_returns, follow
from mbpo_jax.toy import ToyPolicy, ToyWorld, observation

CONFIG = ml_collections.ConfigDict(
    {"chunk": 2, "rl": {"imagination_batch": 2, "discount": 0.5, "discount_per": "reference"}}
)


class StepPolicy(ToyPolicy):
    """Moves by one half in every chunk."""

    def act(self, params, observation, key):
        return np.full((len(observation.proprio), 2, 1), 0.5, np.float32)


def test_given_chunks_are_followed_by_what_the_policy_does():
    policy = StepPolicy()
    params = policy.init() | {"critic": {"w": np.array([0.0, 1.0], np.float32)}}
    first = np.array([0.0, 0.2, -1.0], np.float32)[:, None, None] * np.ones((1, 2, 1), np.float32)
    found = follow(
        CONFIG,
        policy,
        ToyWorld(),
        {},
        params=params,
        start=observation([0.0, 0.4, 0.0]),
        first=first,
        key=jax.random.key(0),
        chunks=3,
    )
    positions = np.array([[0.0, 0.6, -1.0], [0.5, 1.1, -0.5], [1.0, 1.6, 0.0]])
    np.testing.assert_allclose(found["proprio"][..., 0], positions, atol=1e-6)
    np.testing.assert_allclose(found["value"], positions, atol=1e-6)
    np.testing.assert_array_equal(found["done"], positions > 1)


def test_expected_returns_by_hand():
    # γ = 0.5 per chunk, rewards count 1. First branch: 0.5·V_1 = 0.2; 0.5·(0 + 0.5·0.8) = 0.2.
    # Second: P(done) 0.6 at once: 0.6 + 0.4·0.5·0.5 = 0.7; then 1: 0.6 + 0.4·0.5·1 = 0.8.
    followed = {
        "value": np.array([[0.4, 0.5], [0.8, 0.9]]),
        "done": np.array([[0.0, 0.6], [0.0, 1.0]]),
    }
    np.testing.assert_allclose(
        expected_returns(CONFIG, followed), [[0.2, 0.7], [0.2, 0.8]], atol=1e-6
    )
