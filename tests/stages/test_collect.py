import jax
import numpy as np

from mbpo_jax.policy.config import FlowConfig
from mbpo_jax.stages.acting import exploring
from tests.policy.conftest import make_observation, make_policy, random_params


def test_rollouts_explore_with_smooth_noise_if_asked():
    policy = make_policy()
    params, observation, key = random_params(policy), make_observation(), jax.random.key(3)
    assert exploring(policy, 0.0) == policy.act
    smooth = policy.with_flow(FlowConfig(method="smooth", steps=2, noise_std=0.3))
    expected = smooth.sample(params, smooth.encode(params, observation), key).actions
    found = exploring(policy, 0.3)(params, observation, key)
    np.testing.assert_array_equal(found, expected)
    still = exploring(policy, 1e-6)(params, observation, key)
    assert np.abs(found - still).max() > 0.05
