"""Where imagination runs: in micro-batches, over devices, as compiled programs around `mbpo`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mbpo_jax.data.pipelines import process_rows
from mbpo_jax.gradients import join_rows, split_rows
from mbpo_jax.mbpo import MBPO, State, flattened, imagine
from mbpo_jax.stages.build import Config
from mbpo_jax.training.nonfinite import skip_nonfinite
from mbpo_jax.training.sharding import (
    batch_sharding,
    frozen_weight_sharding,
    map_rows,
    on_mesh,
    shard_batch,
)
from mbpo_jax.types import Array, Branch, Demonstration, Params, Policy, WorldModel

# The axis of the start states in each field of a `Branch`.
ROW_AXES = Branch(**dict.fromkeys(Branch.__dataclass_fields__, 1)).replace(
    last_observation=0, bootstrap_value=0
)


def programs(
    config: Config, mbpo: MBPO, world: WorldModel, mesh: Mesh, shardings: State
) -> tuple[Callable, Callable, Callable, Callable]:
    """The compiled programs of policy optimisation.

    Args:
        shardings: of the state that `update` takes (and whose buffers it reuses).

    Returns:
        refill: `(params, world_params, (start, precomputed), key) -> Branch`. revalue: `(params,
            Branch) -> Branch`, with the current critic's values. agreement: `(params, Branch) ->
            metrics`, see `gradient_agreement`; none of a refill too small to halve. update:
            `(State, Branch, key, demonstrations or None) -> (State, metrics)`.

    Raises:
        ValueError: sizes of the `rl` section that do not divide each other or the devices.
    """
    rl, parallel = config.rl, config.parallel
    chunks = rl.start_states * rl.branch_chunks
    minibatch = min(rl.minibatch_size, chunks)
    _check_divides("rl.imagination_batch", rl.imagination_batch, mesh.size)
    _check_divides("rl.start_states", rl.start_states, rl.imagination_batch)
    _check_divides("rl.minibatch_size", minibatch, mesh.size * rl.gradient_accumulation)
    _check_divides("rl.start_states", rl.start_states, mesh.size * rl.group_size)
    if rl.exchange_advantages and rl.start_states < 2 * mesh.size * rl.group_size:
        raise ValueError("rl.exchange_advantages needs two groups or more on every device")
    slices = rl.start_states // rl.imagination_batch

    def imagine_rows(params, world_params, start, rows, key):
        def branch_from(start, keys, precomputed):
            return imagine(
                mbpo.policy,
                world,
                params,
                world_params,
                start,
                keys,
                precomputed,
                chunks=rl.branch_chunks,
                reward_threshold=rl.reward_threshold,
                reward_weight=mbpo.reward_weight,
            )

        keys = branch_keys(key, rows)
        start, precomputed = start
        branch = imagine_in_microbatches(branch_from, start, keys, precomputed, slices=slices)
        return mbpo.with_advantages(branch)

    def revalue_rows(params, branch):
        return mbpo.with_advantages(recompute_values(mbpo.policy, params, branch, slices))

    spread = partial(map_rows, mesh=mesh, how=parallel.rollout, out_axes=ROW_AXES)
    imagine_all = spread(imagine_rows, in_axes=(None, None, 0, 0, None))
    revalue = spread(revalue_rows, in_axes=(None, ROW_AXES))

    def refill(params, world_params, start, key) -> Branch:
        _, in_use = frozen_weight_sharding(world_params, mesh, parallel.rules, parallel.world_model)
        rows = shard_batch(process_rows(rl.start_states), mesh)
        return imagine_all(params, jax.device_put(world_params, in_use), start, rows, key)

    def update(
        state: State, branch: Branch, key, anchors: Demonstration | None = None
    ) -> tuple[State, dict[str, Array]]:
        batch = flattened(branch, rl.normalize_advantages)
        rows = jax.random.permutation(key, chunks)[:minibatch]
        chosen = jax.tree.map(lambda x: x[rows], batch)
        chosen = jax.lax.with_sharding_constraint(chosen, batch_sharding(mesh))
        return mbpo.update(state, chosen, anchors, key)

    unit = mesh.size * rl.gradient_accumulation
    half = min(minibatch, chunks // 2) // unit * unit

    def agreement(params, branch):
        if not half:
            return {}
        batch = flattened(branch, rl.normalize_advantages)
        halves = [
            jax.tree.map(lambda x, at=at: x[at : at + half], batch) for at in (0, chunks // 2)
        ]
        halves = jax.lax.with_sharding_constraint(halves, batch_sharding(mesh))
        return {"gradient_agreement": gradient_agreement(mbpo, params, *halves)}

    update = on_mesh(skip_nonfinite(update), mesh)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    return refill, revalue, jax.jit(on_mesh(agreement, mesh)), update


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


def gradient_agreement(mbpo: MBPO, params: Params, one: Branch, other: Branch) -> Array:
    """Cosine between the actor's gradients on two independent batches: how much of a gradient is
    signal. Of one batch that share is about c, of N of them together N c / (1 + (N - 1) c)."""
    gradients = [mbpo.gradient(params, batch)[0]["actor"] for batch in (one, other)]
    norms = [optax.tree.norm(gradient) for gradient in gradients]
    return optax.tree.vdot(*gradients) / jnp.maximum(norms[0] * norms[1], 1e-12)


def placed_branch(shapes: Branch, mesh: Mesh) -> Branch:
    """Shapes of branches (`jax.eval_shape`), with those rows split over all devices."""

    def placed(axis, part):
        sharding = batch_sharding(mesh, axis)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(placed, ROW_AXES, shapes)


def _check_divides(name: str, size: int, multiple: int) -> None:
    if size % multiple:
        raise ValueError(f"{name} = {size} is not a multiple of {multiple}")


@jax.jit
def _branch_statistics(branch: Branch) -> dict[str, Array]:
    return {
        "imagined_success": 1.0 - jnp.prod(1.0 - branch.done, axis=0).mean(),
        "imagined_return": (branch.reward * branch.mask).sum(0).mean(),
        "imagined_value": (branch.value * branch.mask).sum() / branch.mask.sum(),
        "imagined_advantage_std": jnp.sqrt((jnp.square(branch.advantage[0])).mean()),
        "imagined_action_size": jnp.abs(branch.actions).mean(),
    }


def branch_metrics(branch: Branch) -> dict[str, float]:
    """What is worth watching of a refill; `imagined_success` is the share of branches that end in
    success (with `reward_threshold` 0 the mean probability of it)."""
    return {k: float(v) for k, v in jax.device_get(_branch_statistics(branch)).items()}
