from functools import partial

import jax
import numpy as np
import pytest

from configs import libero_long
from experiments.benchmarks import imagination
from experiments.benchmarks.reference_stack import ReferenceImagination, ServedWorld, world_process
from mbpo_jax.mbpo import imagine


@pytest.fixture(scope="module")
def config():
    config = libero_long.get_config("micro")
    for part in ("vision", "language", "expert"):
        config.policy[part].depth = 1
    config.world_model.model.mot.num_layers = 1
    config.world_model.model.vit.num_layers = 1
    config.rl.imagination_batch = 2
    return config


def test_the_reference_way_imagines_the_same(config, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in the second process too
    policy, world, params, world_params = imagination.models(config)
    # Both sample latents, with other keys: a posterior without spread makes them the same.
    head = world_params["vae"]["encoder"]["conv_out"]
    spread = np.arange(len(head["bias"])) >= len(head["bias"]) // 2
    head["kernel"] = np.where(spread, 0.0, head["kernel"])
    head["bias"] = np.where(spread, -60.0, head["bias"])
    start, key = imagination.start_states(config, 1), jax.random.key(3)
    served = imagination._kind(ServedWorld, world)
    with world_process(served, world_params) as ask:
        reference = ReferenceImagination(policy, ask, world.cameras, chunks=1)
        theirs = reference(params, start, key)
    rollout = partial(imagine, policy, world, chunks=1, reward_threshold=0.5)
    ours = jax.jit(rollout)(params, world_params, start, key[None])
    assert jax.tree.map(np.shape, theirs) == jax.tree.map(np.shape, ours)
    np.testing.assert_allclose(theirs.actions[0], ours.actions[0], atol=1e-5)
    np.testing.assert_allclose(theirs.value[0], ours.value[0], atol=1e-5)
    np.testing.assert_allclose(theirs.log_prob[0], ours.log_prob[0], rtol=1e-4)
    # The generated head view reaches the wrist view as bytes, so only the head views agree.
    head, _ = world.cameras
    pictures = [np.asarray(x.last_observation.images[head], int) for x in (theirs, ours)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - np.asarray(start.images[head], int)).max() > 1
    np.testing.assert_array_equal(theirs.reward, theirs.done * theirs.mask)
    assert min(reference.seconds.values()) > 0
