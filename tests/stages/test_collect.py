import contextlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.libero_long import get_config
from mbpo_jax.policy.config import FlowConfig
from mbpo_jax.stages import collect
from mbpo_jax.stages.acting import exploring
from mbpo_jax.stages.workspace import StageError, Workspace
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


class Spool(dict):
    """Episodes in memory."""

    names, add, load = dict.keys, dict.__setitem__, dict.__getitem__


class Expert:
    """It succeeds with every `rate`-th reset."""

    restarts = 0

    def __init__(self, rate):
        self.rate, self.attempts = rate, 0

    def expert_episodes(self, requests):
        for request in requests:
            self.attempts += 1
            success = request.seed % self.rate == 0
            yield SimpleNamespace(request=request, episode=SimpleNamespace(success=success))


@pytest.mark.parametrize(("rate", "attempts"), [(50, 100), (9, 800)])
def test_an_expert_that_fails_too_often_is_stopped(tmp_path, monkeypatch, rate, attempts):
    # 2 of 100: the interval ends at 0.07, below 1/8. That of 1 in 9 reaches above 1/8 up to the
    # limit of eight attempts at each.
    config, expert = get_config("tiny"), Expert(rate)
    config.demonstrations.episodes_per_task = 100
    monkeypatch.setattr(collect, "EpisodeSpool", lambda directory: Spool())
    monkeypatch.setattr(collect, "make_pool", lambda config: contextlib.nullcontext(expert))
    with pytest.raises(StageError, match=r"aim_error is 0\.02") as error:
        collect.collect_demonstrations(Workspace(tmp_path, config), tmp_path)
    assert f"of {expert.attempts} episodes of task 5" in str(error.value)
    assert expert.attempts == attempts
