import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmarks import world_model as benchmark
from mbpo_jax.world_model import bagel
from mbpo_jax.world_model.metrics import judge, predictor


def small_config():
    config = benchmark.sizes()["tiny"]
    mot = dataclasses.replace(config.mot, num_layers=1)
    return dataclasses.replace(config, num_timesteps=4, mot=mot)


def test_the_reference_order_computes_the_same():
    config = small_config()
    world = benchmark.build(config)
    reference = benchmark.build(config, benchmark.ReferenceOrder)
    params = benchmark.awake(world.init(jax.random.key(0)))
    observation, actions = benchmark.inputs(world, 1)
    key = jax.random.key(2)

    slow = jax.jit(predictor(reference))(params, observation, actions, key)
    # The reference order gives every example a key of its own.
    encode_key, step_key = (jax.random.split(k, 1)[0] for k in jax.random.split(key))
    state = jax.jit(world.encode)(params, observation, encode_key)
    fast = jax.jit(world.step)(params, state, actions, step_key).observation
    for camera in benchmark.CAMERAS:
        a, b = (np.asarray(x.images[camera], int) for x in (slow, fast))
        assert np.abs(a - b).max() <= 1
        assert np.abs(a - np.asarray(observation.images[camera], int)).max() > 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_decoded_answer_agrees_with_the_one_pass_probability(sign):
    config = small_config()
    world = benchmark.build(config)
    reference = benchmark.build(config, benchmark.ReferenceOrder)
    params = world.init(jax.random.key(0))
    observation, _ = benchmark.inputs(world, 2)
    features = world.first_view_features(params, observation)
    segments = world.answer_segments(params, features, observation)
    hidden = bagel.forward(params, config, segments)[0][:, -1]
    # The column of "Yes" along the answer's hidden state makes it certain, against it impossible.
    head = params["mot"]["lm_head"]
    head["kernel"] = head["kernel"].at[:, world.yes_id].set(sign * hidden.mean(0))
    probability = np.asarray(judge(world)(params, observation))
    decoded = np.asarray(judge(reference)(params, observation))
    np.testing.assert_array_equal(decoded, [sign > 0] * 2)
    np.testing.assert_array_equal(probability > 0.5, decoded)
