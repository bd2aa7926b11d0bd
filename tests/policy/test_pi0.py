import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.policy import network
from mbpo_jax.policy.config import LoraConfig, variants
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.types import Prompt

from .conftest import (
    ACTION_DIM,
    CAMERAS,
    FLOWS,
    TINY,
    make_observation,
    make_policy,
    random_params,
    stats,
)


def velocity_of(policy, params, observation, camera_mask=None):
    prefix = policy.encode(params, observation, camera_mask)
    x = jnp.linspace(-1, 1, 3 * 4 * 5).reshape(3, 1, 4, 5)
    time = network.at_times(params["actor"], policy.config, jnp.full((3, 1), 0.4))
    return network.velocity(params["actor"], policy.config, prefix)(x, time)[0]


def change(array, where):
    changed = np.array(array)
    changed[where] = 255 - changed[where] if changed.dtype == np.uint8 else changed[where] + 1
    return changed


def test_masked_camera_is_ignored(observation):
    policy = make_policy()
    params = random_params(policy)
    view = "robot0_eye_in_hand"
    other = observation.replace(
        images={**observation.images, view: change(observation.images[view], 0)}
    )
    masks = {"agentview": jnp.ones(3, bool), view: jnp.array([False, True, True])}
    np.testing.assert_allclose(
        velocity_of(policy, params, observation, masks),
        velocity_of(policy, params, other, masks),
        atol=1e-6,
    )
    assert (
        np.abs(velocity_of(policy, params, observation) - velocity_of(policy, params, other))[
            0
        ].max()
        > 1e-3
    )


def test_masked_camera_equals_absent_camera(observation):
    policy, single = make_policy(), make_policy()
    single.cameras = ("agentview",)
    params = random_params(policy)
    masks = {"agentview": jnp.ones(3, bool), "robot0_eye_in_hand": jnp.zeros(3, bool)}
    np.testing.assert_allclose(
        velocity_of(policy, params, observation, masks),
        velocity_of(single, params, observation),
        atol=1e-5,
    )


def test_prompt_matters_but_its_padding_does_not(observation):
    policy = make_policy()
    params = random_params(policy)
    tokens, mask = observation.prompt.tokens, observation.prompt.mask
    padding = Prompt(np.where(mask, tokens, (tokens + 1) % 40), mask)
    words = Prompt(np.where(mask, (tokens + 1) % 40, tokens), mask)
    base = velocity_of(policy, params, observation)
    np.testing.assert_allclose(
        base, velocity_of(policy, params, observation.replace(prompt=padding)), atol=1e-6
    )
    assert np.abs(base - velocity_of(policy, params, observation.replace(prompt=words))).min() > 0


def test_proprio_is_read_by_pi0_only(observation):
    other = observation.replace(proprio=observation.proprio + 1)
    pi05 = make_policy()
    pi0 = make_policy(pi05=False, use_proprio=True)
    blind = make_policy(pi05=False)
    for policy, reads in ((pi05, False), (pi0, True), (blind, False)):
        params = random_params(policy)
        base, changed = (velocity_of(policy, params, o) for o in (observation, other))
        assert bool(np.abs(base - changed).max() > 1e-3) == reads


def test_flow_times_of_one_prefix_do_not_see_each_other(observation):
    for pi05 in (True, False):
        policy = make_policy(pi05=pi05)
        params = random_params(policy)
        prefix = policy.encode(params, observation)
        x = jax.random.normal(jax.random.key(1), (3, 3, 4, 5))
        times = jnp.linspace(0.1, 0.9, 9).reshape(3, 3)
        time = network.at_times(params["actor"], policy.config, times)
        together, _ = network.velocity(params["actor"], policy.config, prefix)(x, time)
        for m in range(3):
            one, here = jax.tree.map(lambda y, m=m: y[:, m : m + 1], (x, time))
            alone, _ = network.velocity(params["actor"], policy.config, prefix)(one, here)
            np.testing.assert_allclose(together[:, m], alone[:, 0], atol=2e-5)


@pytest.mark.parametrize("method", FLOWS)
def test_stored_chain_has_its_sampling_log_prob(method, observation):
    policy = make_policy(flow=FLOWS[method])
    params = random_params(policy)
    prefix = jax.jit(policy.encode)(params, observation)
    sample = jax.jit(policy.sample)(params, prefix, jax.random.key(2))
    again = jax.jit(policy.log_prob)(params, prefix, sample.chain)
    assert sample.actions.shape == (3, 4, ACTION_DIM)
    # A sum over the chunk's entries and up to four steps; 1e-5 is the tolerance of one term.
    np.testing.assert_allclose(again, sample.log_prob, atol=1e-5 * 4 * ACTION_DIM * 4, rtol=1e-5)
    changed = jax.tree.map(lambda x: x + 0.05, params)
    assert np.abs(policy.log_prob(changed, prefix, sample.chain) - again).min() > 1e-3


def test_log_prob_leaves_padded_dimensions_out(observation):
    policy = make_policy()
    params = random_params(policy)
    prefix = policy.encode(params, observation)
    chain = policy.sample(params, prefix, jax.random.key(2)).chain
    base = policy.log_prob(params, prefix, chain)
    padded = chain.replace(next_state=chain.next_state.at[..., ACTION_DIM:].add(1.0))
    real = chain.replace(next_state=chain.next_state.at[..., ACTION_DIM - 1].add(1.0))
    np.testing.assert_array_equal(base, policy.log_prob(params, prefix, padded))
    assert np.abs(base - policy.log_prob(params, prefix, real)).min() > 1e-2


def test_flow_sde_keys_choose_steps_and_noise(observation):
    policy = make_policy()
    params = random_params(policy)
    many = make_observation(batch=64)
    prefix = policy.encode(params, many)
    sample = jax.jit(policy.sample)
    first, second = (sample(params, prefix, jax.random.key(seed)) for seed in (0, 1))
    assert set(np.asarray(first.chain.step).tolist()) == {0, 1, 2}
    assert np.abs(first.actions - second.actions).max() > 0
    np.testing.assert_array_equal(first.actions, sample(params, prefix, jax.random.key(0)).actions)


def test_actions_are_in_robot_units(observation):
    limits = np.array([(-0.3, 0.4), (0.0, 2.0), (-5.0, 5.0)])
    policy = FlowPolicy(TINY, stats(ACTION_DIM), stats(4), CAMERAS, limits)
    params = random_params(policy)
    actions = jax.jit(policy.act)(params, observation, jax.random.key(0))
    chex.assert_shape(actions, (3, 4, ACTION_DIM))
    # A network that is zero everywhere leaves the noise as it is; quantile statistics scale it, and
    # the robot's limits cut it off.
    zero = jax.tree.map(jnp.zeros_like, params)
    noise = jax.random.normal(jax.random.key(0), (3, 4, 5))[..., :ACTION_DIM]
    low, high = stats(ACTION_DIM).q01, stats(ACTION_DIM).q99
    expected = np.clip((noise + 1) / 2 * (high - low + 1e-6) + low, *limits.T)
    np.testing.assert_allclose(
        policy.act(zero, observation, jax.random.key(0)), expected, atol=1e-6
    )
    assert np.any(expected > 1)
    # Without a key there is no noise, and such a network gives the middle of the statistics.
    middle = np.broadcast_to(np.clip((high - low) / 2 + low, *limits.T), (3, 4, ACTION_DIM))
    np.testing.assert_allclose(policy.act(zero, observation, None), middle, atol=1e-6)


def test_value_is_the_minimum_and_does_not_train_the_actor(observation):
    policy = make_policy()
    params = random_params(policy)
    prefix = policy.encode(params, observation)
    values = policy.values(params, prefix)
    assert values.shape == (3, 3)
    np.testing.assert_array_equal(policy.value(params, prefix), np.asarray(values).min(0))

    def total(params):
        return policy.value(params, policy.encode(params, observation)).sum()

    gradients = jax.grad(total)(params)
    assert all(not np.any(g) for g in jax.tree.leaves(gradients["actor"]))
    assert any(np.any(g) for g in jax.tree.leaves(gradients["critic"]))


def test_loss_of_a_zero_network_is_the_target_power(observation):
    """v = 0 leaves |ε − a|²: 1 for a = 0 in the padded dimensions, 1 + a² elsewhere."""
    policy = make_policy(times_per_example=400)
    actor = jax.tree.map(jnp.zeros_like, policy.init(jax.random.key(0))["actor"])
    low, high = stats(ACTION_DIM).q01, stats(ACTION_DIM).q99
    actions = np.broadcast_to(high, (3, 4, ACTION_DIM)).astype(np.float32)  # normalised: 1
    loss, metrics = policy.loss(actor, observation, actions, jax.random.key(0))
    assert low.shape == (ACTION_DIM,)
    np.testing.assert_allclose(loss, (3 * 2 + 2 * 1) / 5, rtol=0.05)
    np.testing.assert_allclose(metrics["velocity_error"], 2, rtol=0.05)


@pytest.mark.parametrize("change", [{"remat": True}, {"unroll": True}])
def test_memory_options_keep_the_gradient(change, observation):
    plain, other = make_policy(), make_policy(**change)
    actor = random_params(plain)["actor"]
    actions = np.zeros((3, 4, ACTION_DIM), np.float32)

    def gradient(policy):
        return jax.jit(
            jax.grad(lambda a: policy.loss(a, observation, actions, jax.random.key(1))[0])
        )

    for a, b in zip(
        jax.tree.leaves(gradient(plain)(actor)), jax.tree.leaves(gradient(other)(actor))
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_bfloat16_computes_near_float32_and_keeps_float32_gradients(observation):
    plain, half = make_policy(), make_policy(dtype="bfloat16")
    params = plain.init(jax.random.key(0))
    base, rounded = (velocity_of(p, params, observation) for p in (plain, half))
    difference = np.abs(base - rounded).max()
    assert 0 < difference < 0.05
    actions = np.zeros((3, 4, ACTION_DIM), np.float32)
    gradients = jax.grad(lambda a: half.loss(a, observation, actions, jax.random.key(1))[0])(
        params["actor"]
    )
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_cache_only_prefix_has_the_same_cache(observation):
    policy = make_policy()
    actor = random_params(policy)["actor"]
    full = policy._encode(actor, observation)
    short = policy._encode(actor, observation, with_features=False)
    assert short.features is None
    for a, b in zip(jax.tree.leaves(full.cache), jax.tree.leaves(short.cache)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_variant_sizes():
    """Parameters of openpi's π0.5 with its 257152-word vocabulary, and of the small variants."""

    def millions(config):
        tree = jax.eval_shape(lambda key: network.init(key, config), jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(tree)) / 1e6

    sizes = {name: millions(config) for name, config in variants().items()}
    assert 1 < sizes["micro"] < 2.5
    assert 25 < sizes["small"] < 35
    assert 3300 < sizes["pi05"] < 3400


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="use_proprio"):
        dataclasses.replace(TINY, use_proprio=True)
    with pytest.raises(ValueError, match=r"flow\.method"):
        dataclasses.replace(TINY.flow, method="cps")
    with pytest.raises(ValueError, match="action_dim >= 3"):
        make_policy(action_dim=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pi05": False, "unroll": True},
        {"lora": LoraConfig(rank=2)},
        {"dtype": "bfloat16"},
    ],
    ids=["pi05", "pi0", "lora", "bfloat16"],
)
def test_parameters_for_inference_change_no_result(observation, options):
    policy = make_policy(**options)
    params = random_params(policy)
    fast = policy.for_inference(params)
    assert "lora" not in fast["actor"]
    key = jax.random.key(3)
    results = []
    for given in (params, fast):
        prefix = policy.encode(given, observation)
        sample = policy.sample(given, prefix, key)
        results.append(
            {
                "act": policy.act(given, observation, key),
                "actions": sample.actions,
                "log_prob": policy.log_prob(given, prefix, sample.chain),
                "value": policy.value(given, prefix),
            }
        )
    tolerance = 6e-2 if policy.config.dtype == "bfloat16" else 1e-4
    for name, expected in results[0].items():
        np.testing.assert_allclose(results[1][name], expected, tolerance, tolerance, err_msg=name)
