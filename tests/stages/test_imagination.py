import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.mbpo import MBPO, Settings, flattened, imagine
from mbpo_jax.stages.imagination import branch_keys, imagine_in_microbatches, recompute_values
from mbpo_jax.toy import ToyPolicy, ToyWorld, observation
from mbpo_jax.types import WorldState

POLICY, WORLD = ToyPolicy(), ToyWorld()


def keys(seed, count):
    return branch_keys(jax.random.key(seed), np.arange(count))


def branch_from(start, keys, chunks=3, mean=0.0, weight=1.0):
    params = POLICY.init()
    params["actor"]["mean"] = jnp.asarray(mean)
    params["critic"]["w"] = jnp.array([0.5, 2.0])
    return imagine(
        POLICY,
        WORLD,
        params,
        {},
        start,
        keys,
        chunks=chunks,
        reward_threshold=0.5,
        reward_weight=weight,
    )


def test_a_branch_follows_the_world_and_records_it():
    branch = branch_from(observation([-5.0, -4.0]), keys(0, 2))
    assert branch.actions.shape == (3, 2, 2, 1)
    moved = np.asarray(branch.actions).mean((2, 3)).cumsum(0)
    np.testing.assert_allclose(branch.observation.proprio[0, :, 0], [-5.0, -4.0])
    np.testing.assert_allclose(
        branch.observation.proprio[1:, :, 0], [-5.0, -4.0] + moved[:2], atol=1e-6
    )
    np.testing.assert_allclose(
        branch.last_observation.proprio[:, 0], [-5.0, -4.0] + moved[2], atol=1e-6
    )
    expected = 0.5 + 2.0 * branch.last_observation.proprio[:, 0]
    np.testing.assert_allclose(branch.bootstrap_value, expected, atol=1e-6)
    assert not branch.reward.any()
    assert branch.mask.all()


def test_a_branch_ends_at_its_first_success():
    # Moving 2 per chunk from -1.5: -1.5 → 0.5 → 2.5 (done in the second chunk) → ...
    branch = branch_from(observation([-1.5]), keys(1, 1), chunks=4, mean=2.0, weight=0.75)
    np.testing.assert_array_equal(branch.mask[:, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(branch.reward[:, 0], [0, 0.75, 0, 0])
    mbpo = MBPO(POLICY, Settings(discount=0.9, discount_per="reference"), chunk=2)
    batch = flattened(mbpo.with_advantages(branch), normalize=False)
    # The ended chunk's return is its reward alone.
    np.testing.assert_allclose(batch.returns[1], 0.75, atol=1e-6)


def test_microbatches_give_what_one_batch_gives():
    start = observation(np.linspace(-9, -3, 6))
    whole = branch_from(start, keys(2, 6))
    parts = imagine_in_microbatches(branch_from, start, keys(2, 6), slices=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)
    assert len(set(np.asarray(whole.actions)[0, :, 0, 0])) == 6
    with pytest.raises(ValueError, match="does not divide into 4 slices"):
        imagine_in_microbatches(branch_from, start, keys(2, 6), slices=4)


def test_values_are_recomputed_with_the_new_critic():
    branch = branch_from(observation([-5.0, -4.0, -3.0]), keys(0, 3))
    params = POLICY.init()
    params["critic"]["w"] = jnp.array([-1.0, 1.0])
    again = recompute_values(POLICY, params, branch, slices=3)
    np.testing.assert_allclose(again.value, branch.observation.proprio[..., 0] - 1.0, atol=1e-6)
    np.testing.assert_allclose(
        again.bootstrap_value, branch.last_observation.proprio[:, 0] - 1.0, atol=1e-6
    )
    np.testing.assert_array_equal(again.log_prob, branch.log_prob)


class HungryWorld(ToyWorld):
    """Needs 256 KiB for each branch while it steps, as a large model would."""

    def step(self, params, state, actions, key):
        memory = jax.random.normal(key, (len(actions), 2**16))
        memory = jnp.sort(memory + actions.mean((1, 2))[:, None], axis=1)
        return WorldState(state.observation.replace(proprio=memory[:, :1]))


def working_memory(branches, micro_batch, chunks=2):
    """Bytes that the compiled rollout needs beside its arguments and results."""

    def rollout(start, keys):
        return imagine(
            POLICY,
            HungryWorld(),
            POLICY.init(),
            {},
            start,
            keys,
            chunks=chunks,
            reward_threshold=0.5,
        )

    def program(start, keys):
        return imagine_in_microbatches(rollout, start, keys, slices=branches // micro_batch)

    start = observation(np.zeros(branches))
    compiled = jax.jit(program).lower(start, keys(0, branches)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_branches_or_chunks_beyond_what_is_stored():
    one_branch = 2**18
    few = working_memory(4, 4)
    assert few > 4 * one_branch
    assert working_memory(64, 4) < few + one_branch
    assert working_memory(4, 4, chunks=16) < few + one_branch
    assert working_memory(64, 64) > 8 * few


class UnsureWorld(ToyWorld):
    def success_probability(self, params, state):
        return jnp.full(len(state.observation.proprio), 0.25)


def test_a_probability_as_reward_counts_the_way_there_once():
    # P(done) = 1/4 after each of two chunks, w = 0.8, γ = 0.5, λ = 1, no value: the return is
    # 0.8 · (1/4 + 0.5 · 3/4 · 1/4) = 0.275.
    policy = ToyPolicy()
    options = {"chunks": 2, "reward_threshold": 0.0, "reward_weight": 0.8}
    branch = imagine(
        policy, UnsureWorld(), policy.init(), {}, observation([0.0]), keys(0, 1), **options
    )
    np.testing.assert_allclose(branch.reward[:, 0], [0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(branch.mask[:, 0], [1.0, 0.75], atol=1e-6)
    mbpo = MBPO(policy, Settings(discount=0.5, discount_per="reference", gae_lambda=1.0), chunk=2)
    np.testing.assert_allclose(mbpo.with_advantages(branch).returns[0], 0.275, atol=1e-6)
