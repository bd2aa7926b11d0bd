"""The branched rollout: policy and world model in one `lax.scan`, with no host round trip."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbpo_jax.gradients import join_rows, split_rows
from mbpo_jax.types import Array, Branch, Observation, Params, Policy, WorldModel

# The axis of the start states in each field of a `Branch`.
ROW_AXES = Branch(**dict.fromkeys(Branch.__dataclass_fields__, 1)).replace(
    last_observation=0, bootstrap_value=0
)


def imagine(
    policy: Policy,
    world: WorldModel,
    policy_params: Params,
    world_params: Params,
    start: Observation,
    keys: Array,
    precomputed: Any = None,
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

    Each branch is a function of its own start state and key, so that how branches are grouped, or
    spread over devices, does not matter.

    Args:
        start: observations of M start states (leading axis [M]).
        keys: random keys [M], one for each branch (see `branch_keys`).
        precomputed: what `WorldModel.precompute` gave for the start states, if it was called.
        chunks: n, the branch length; for full-horizon imagination the episode's.
        reward_threshold: the reward is 1 where the decoded probability is above this. At 0 it is
            the probability itself, and a branch goes on with the weight of its not having ended:
            `done` and `valid` are probabilities then, `done` and the reward those of a branch that
            has come so far.
        reward_weight: what a reward at a chunk's last step counts (`chunk_discount`).

    Returns:
        a `Branch` with leading axes [n, M].
    """

    def branch(start, key, precomputed):
        def chunk_step(carry, chunk_key):
            state, alive = carry
            observation = state.observation
            sample_key, world_key = jax.random.split(chunk_key)
            prefix = policy.encode(policy_params, observation)
            sample = policy.sample(policy_params, prefix, sample_key)
            value = policy.value(policy_params, prefix)
            following = world.step(world_params, state, sample.actions, world_key)
            done = world.reward(world_params, following).astype(jnp.float32)
            if reward_threshold:
                done = (done > reward_threshold).astype(jnp.float32)
            record = {
                "observation": observation,
                "chain": sample.chain,
                "actions": sample.actions,
                "log_prob": sample.log_prob,
                "value": value,
                "reward": reward_weight * done * (alive if reward_threshold else 1.0),
                "done": done,
                "valid": alive,
            }
            return (following, alive * (1.0 - done)), record

        start_key, *chunk_keys = jax.random.split(key, 1 + chunks)
        state = world.encode(
            world_params, _batch_of_one(start), start_key, _batch_of_one(precomputed)
        )
        alive = jnp.ones(1, jnp.float32)
        (state, _), records = jax.lax.scan(chunk_step, (state, alive), jnp.stack(chunk_keys))
        last = state.observation
        bootstrap = policy.value(policy_params, policy.encode(policy_params, last))
        records = jax.tree.map(lambda x: x[:, 0], records)
        return records, jax.tree.map(lambda x: x[0], (last, bootstrap))

    records, (last, bootstrap) = jax.vmap(branch, out_axes=(1, 0))(start, keys, precomputed)
    return Branch(**records, last_observation=last, bootstrap_value=bootstrap)


def branch_keys(key: Array, rows: Array) -> Array:
    """Keys [M] of the branches whose numbers among all start states are `rows`, int [M]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def imagine_in_microbatches(imagine_fn: Callable[..., Branch], *rows: Any, slices: int) -> Branch:
    """Runs `imagine_fn(*rows)`, whose arguments have leading axes [M], over `slices` parts of the M
    start states, one after the other, so that memory does not grow with M. The result is that of
    one call.

    Raises:
        ValueError: when M is not a multiple of `slices`.
    """
    branches = jax.lax.map(lambda part: imagine_fn(*part), split_rows(rows, slices))
    last = join_rows((branches.last_observation, branches.bootstrap_value))
    per_chunk = branches.replace(last_observation=None, bootstrap_value=None)
    per_chunk = jax.vmap(join_rows, in_axes=1)(per_chunk)
    return per_chunk.replace(last_observation=last[0], bootstrap_value=last[1])


def recompute_values(policy: Policy, params: Params, branch: Branch, slices: int) -> Branch:
    """The same branch with the current critic's values of all its observations, computed for
    `slices` parts of the start states, one after the other."""

    def values(observation):
        def slice_values(rows):
            return policy.value(params, policy.encode(params, rows))

        return join_rows(jax.lax.map(slice_values, split_rows(observation, slices)))

    return branch.replace(
        value=jax.lax.map(values, branch.observation),
        bootstrap_value=values(branch.last_observation),
    )


def _batch_of_one(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)
