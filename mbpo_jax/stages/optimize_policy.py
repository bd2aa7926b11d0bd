"""The loop of the method on devices: refill a buffer of imagined branches, update on it (PPO)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mbpo_jax.data.pipelines import Source, batches, collate, equal_parts, process_rows
from mbpo_jax.mbpo import MBPO, Settings
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import Config, dataclass_from
from mbpo_jax.stages.imagination import branch_metrics, placed_branch, programs
from mbpo_jax.stages.workspace import StageError
from mbpo_jax.training.loop import repeat
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import (
    frozen_weight_sharding,
    on_mesh,
    parameter_sharding,
    shard_batch,
)
from mbpo_jax.types import Params, Policy, WorldModel


def optimize_policy(
    config: Config,
    policy: Policy,
    world: WorldModel,
    params: Params,
    world_params: Params,
    starts: Source,
    demonstrated: Source | None = None,
    *,
    directory: Path,
    origin: Mapping[str, Any] | None = None,
    trainable: Params | None = None,
    algorithm: Callable[..., MBPO] = MBPO,
) -> Params:
    """The loop of the method: refill a buffer of imagined branches, then clipped updates on it.

    A run that is killed continues in `directory` from its last checkpoint, state and buffer, and
    ends with the same parameters and metrics. Beside the newest checkpoints stays the one of the
    highest imagined success. An update with numbers that are not finite changes nothing and is
    counted in the metric `skipped`.

    Args:
        starts: the observations that branches may start from.
        demonstrated: what the anchor holds on to, where `rl.anchor_weight` is above 0.
        directory: receives metrics and checkpoints.
        origin: of the checkpoints, see `Checkpoints`; the seed is added.
        trainable: which of the actor's parameters move (see `MBPO`).
        algorithm: what is called as `MBPO` is, and gives one.

    Returns:
        the improved {"actor", "critic"} parameters.

    Raises:
        FloatingPointError: three updates in a row were not finite; see `NonFiniteGuard`.
        Interrupted: SIGTERM came; the state is saved.
        OSError: a checkpoint cannot be written; earlier ones are kept.
        StageError: there are no start states.
    """
    rl = config.rl
    run = Run.of(config, "policy optimisation", directory, config.seed, origin or {})
    mbpo = algorithm(policy, dataclass_from(Settings, rl), config.chunk, trainable)
    shardings = parameter_sharding(jax.eval_shape(mbpo.init, params), run.mesh, run.rules)
    state = jax.jit(mbpo.init, out_shardings=shardings)(jax.device_put(params, shardings.params))
    at_rest, _ = frozen_weight_sharding(
        world_params, run.mesh, run.rules, config.parallel.world_model
    )
    world_params = jax.device_put(world_params, at_rest)
    refill, revalue, agreement, update = programs(config, mbpo, world, run.mesh, shardings)
    key = jax.random.key(stream(config.seed, "improve"))
    starts = _precomputed(config, world, world_params, starts, run.mesh)

    def starts_at(i: int):
        drawn = batches(
            starts,
            rl.start_states // rl.group_size,
            stream(config.seed, "improve_starts"),
            start_step=i // rl.updates_per_refill,
        )
        groups = jax.tree.map(lambda x: np.repeat(x, rl.group_size, axis=0), next(drawn))
        return shard_batch(groups, run.mesh)

    def anchors_at(i: int):
        if not rl.anchor_weight:
            return None
        seed = stream(config.seed, "improve_anchors")
        drawn = batches(demonstrated, rl.anchor_batch, seed, start_step=i)
        return shard_batch(next(drawn), run.mesh)

    def prepare(i: int, carry):
        state, branch = carry["state"], carry["branch"]
        known = {}
        if i % rl.updates_per_refill == 0:
            branch = refill(state.params, world_params, starts_at(i), jax.random.fold_in(key, i))
            known = branch_metrics(branch)
            known |= jax.tree.map(float, agreement(state.params, branch))
        elif i % rl.value_recompute_every == 0:
            branch = revalue(state.params, branch)
        return {"state": state, "branch": branch}, known

    def step(i: int, carry):
        update_key = jax.random.fold_in(key, 2 * rl.updates + i)
        state, metrics = update(carry["state"], carry["branch"], update_key, anchors_at(i))
        return carry | {"state": state}, metrics, carry["branch"]

    def like():
        shapes = jax.eval_shape(refill, state.params, world_params, starts_at(0), key)
        return {"state": state, "branch": placed_branch(shapes, run.mesh)}

    carry = repeat(
        step,
        {"state": state, "branch": None},
        run,
        steps=rl.updates,
        log_every=1,
        checkpoint_every=rl.checkpoint_every,
        shown=("approx_kl", "value_error"),
        prepare=prepare,
        like=like,
        best="imagined_success",
    )
    return carry["state"].params


def _precomputed(
    config: Config, world: WorldModel, world_params: Params, starts: Source, mesh: Mesh
) -> Source:
    """Records (observation, what the world model precomputes of it): branches start from each
    observation several times, and the world model stays as it is."""
    if not len(starts):
        raise StageError(
            "no frame of the training rollouts is a state to start branches from: collect more "
            "(--config.rollouts.episodes_per_task)"
        )
    _, in_use = frozen_weight_sharding(
        world_params, mesh, config.parallel.rules, config.parallel.world_model
    )

    def precompute(world_params, observation, key):
        return world.precompute(jax.device_put(world_params, in_use), observation, key)

    # Every process needs what belongs to any record.
    everywhere = NamedSharding(mesh, PartitionSpec())
    precompute = jax.jit(on_mesh(precompute, mesh), out_shardings=everywhere)
    size = config.rl.imagination_batch
    found = []
    for i, rows in enumerate(tqdm(equal_parts(len(starts), size), desc="encoding start states")):
        batch = collate([starts[row] for row in rows[process_rows(size)]])
        key = jax.random.fold_in(jax.random.key(stream(config.seed, "improve_encoding")), i)
        found.append(jax.device_get(precompute(world_params, shard_batch(batch, mesh), key)))
    everything = jax.tree.map(lambda *x: np.concatenate(x), *found)

    def record(row):
        return starts[row], jax.tree.map(lambda x: x[row], everything)

    return Source(record, np.arange(len(starts))[:, None])
