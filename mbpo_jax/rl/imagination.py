"""The branched rollout: policy and world model in one `lax.scan`, with no host round trip."""

import jax
import jax.numpy as jnp

from mbpo_jax.types import Array, Branch, Observation, Params, Policy, WorldModel


def imagine(
    policy: Policy,
    world: WorldModel,
    policy_params: Params,
    world_params: Params,
    start: Observation,
    key: Array,
    *,
    chunks: int,
    reward_threshold: float,
    reward_weight: float = 1.0,
) -> Branch:
    """Rolls the policy `chunks` action chunks forward inside the world model
    (arXiv 2603.20607, section 4.3: chunk-level branched rollout).

    Each chunk: encode the observation once, sample a chunk with its log-probability and value,
    imagine the views a chunk later, decode whether the task is done there. A branch ends at its
    first success; what follows it is computed but marked invalid.

    Args:
        start: observations of M start states (leading axis [M]).
        chunks: n, the branch length; for full-horizon imagination the episode's.
        reward_threshold: the reward is 1 where the decoded probability is above this.
        reward_weight: what a reward at a chunk's last step counts (`chunk_discount`).

    Returns:
        a `Branch` with leading axes [n, M].
    """

    def chunk_step(carry, chunk_key):
        observation, alive = carry
        sample_key, world_key = jax.random.split(chunk_key)
        prefix = policy.encode(policy_params, observation)
        sample = policy.sample(policy_params, prefix, sample_key)
        value = policy.value(policy_params, prefix)
        following = world.step(world_params, observation, sample.actions, world_key)
        done = (world.reward(world_params, following) > reward_threshold).astype(jnp.float32)
        record = {
            "observation": observation,
            "chain": sample.chain,
            "actions": sample.actions,
            "log_prob": sample.log_prob,
            "value": value,
            "reward": reward_weight * done * alive,
            "done": done,
            "valid": alive,
        }
        return (following, alive * (1.0 - done)), record

    alive = jnp.ones(start.proprio.shape[0], jnp.float32)
    (last, _), records = jax.lax.scan(chunk_step, (start, alive), jax.random.split(key, chunks))
    bootstrap = policy.value(policy_params, policy.encode(policy_params, last))
    return Branch(**records, last_observation=last, bootstrap_value=bootstrap)


def imagine_in_microbatches(imagine_fn, start: Observation, key: Array, micro_batch: int) -> Branch:
    """Runs `imagine_fn(start, key) -> Branch` over slices of `micro_batch` start states, one after
    the other, so that memory does not grow with their number M.

    Raises:
        ValueError: when M is not a multiple of `micro_batch`.
    """
    total = start.proprio.shape[0]
    if total % micro_batch:
        raise ValueError(
            f"rl.start_states = {total} is not a multiple of rl.imagination_batch = {micro_batch}"
        )
    slices = total // micro_batch
    sliced = jax.tree.map(lambda x: x.reshape(slices, micro_batch, *x.shape[1:]), start)
    branches = jax.lax.map(lambda xs: imagine_fn(*xs), (sliced, jax.random.split(key, slices)))

    def join(x):  # [slices, n, micro_batch, ...] -> [n, M, ...]
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], total, *x.shape[3:])

    def join_last(x):  # [slices, micro_batch, ...] -> [M, ...]
        return x.reshape(total, *x.shape[2:])

    last = jax.tree.map(join_last, (branches.last_observation, branches.bootstrap_value))
    per_chunk = branches.replace(last_observation=None, bootstrap_value=None)
    return jax.tree.map(join, per_chunk).replace(last_observation=last[0], bootstrap_value=last[1])


def recompute_values(policy: Policy, params: Params, branch: Branch, micro_batch: int) -> Branch:
    """The same branch with the current critic's values of all its observations."""

    def values(observation):
        def value(one):
            batch = jax.tree.map(lambda x: x[None], one)
            return policy.value(params, policy.encode(params, batch))[0]

        return jax.lax.map(value, observation, batch_size=micro_batch)

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), branch.observation)
    return branch.replace(
        value=values(flat).reshape(branch.value.shape),
        bootstrap_value=values(branch.last_observation),
    )
