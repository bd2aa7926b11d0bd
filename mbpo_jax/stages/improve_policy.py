"""Stage `improve`: PPO on branches imagined by the world model."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import (
    Source,
    batches,
    branch_starts,
    collate,
    demonstrations,
    process_rows,
)
from mbpo_jax.envs.simulated_world import SimulatedWorld
from mbpo_jax.episode import Episode
from mbpo_jax.rl.gae import chunk_discount, exchanged, learning_batch, with_advantages
from mbpo_jax.rl.imagination import (
    ROW_AXES,
    branch_keys,
    imagine,
    imagine_in_microbatches,
    recompute_values,
)
from mbpo_jax.rl.ppo import PPO, PPOState, gradient_agreement
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    Config,
    abstract_params,
    build_policy,
    build_world_model,
    checkpoint_origin,
    observation_builder,
)
from mbpo_jax.stages.collect import make_pool
from mbpo_jax.stages.finetune_world_model import world_model_episodes
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import Checkpoints, load_params, save_params
from mbpo_jax.training.interruption import Interrupted, deferred
from mbpo_jax.training.metrics import MetricWriter, read_metrics
from mbpo_jax.training.nonfinite import NonFiniteGuard, skip_nonfinite
from mbpo_jax.training.profiling import StepProfiler
from mbpo_jax.training.sharding import (
    batch_sharding,
    frozen_weight_sharding,
    make_mesh,
    map_rows,
    on_mesh,
    parameter_sharding,
    shard_batch,
)
from mbpo_jax.types import Array, Branch, Demonstration, Params, Policy, WorldModel
from mbpo_jax.world_model import metrics as world_metrics


def improve_policy(workspace: Workspace, directory: Path) -> dict:
    """Improves the fine-tuned policy without touching the simulator; writes `policy/`."""
    config = workspace.config
    workspace.require("sft")
    workspace.require("world_model")
    workspace.require("value")
    sft = workspace.directory("sft")
    stats = read_norm_stats(sft / "norm_stats.json")
    policy = build_policy(config, stats)
    layout = make_mesh(config.parallel.fsdp), config.parallel.rules
    shapes = abstract_params(policy, *layout)
    params = load_params(sft / "policy", shapes)
    params["critic"] = load_params(workspace.directory("value") / "critic", shapes["critic"])
    episodes, _ = world_model_episodes(workspace)
    builder = observation_builder(config)
    starts = branch_starts(episodes, builder)
    if config.rl.start_states_from == "episode_start":
        starts = starts.where(starts.index[:, 1] == 0)
    elif config.rl.start_states_from != "dataset":
        raise StageError(
            f"rl.start_states_from is {config.rl.start_states_from!r}; choose 'dataset' (branched "
            "rollouts) or 'episode_start' (full-horizon imagination)"
        )
    demonstrated = read_episodes(workspace.directory("demonstrations") / "dataset")
    with _world(config, workspace, episodes) as (world, world_params):
        if isinstance(world, SimulatedWorld):
            starts = starts.where(np.array([world.knows(x) for x in starts], bool))
        judged_done = done_at_start(config, world, world_params, starts)
        improved = optimize_policy(
            config,
            policy,
            world,
            params,
            world_params,
            starts.where(~judged_done),
            demonstrations(demonstrated, builder),
            directory=directory,
            origin=checkpoint_origin(
                config, ["policy", "rl"], {name: vars(x) for name, x in stats.items()}
            ),
            trainable=policy.trainable(params)["actor"],
        )
    save_params(directory / "policy", improved)
    history = read_metrics(directory / "metrics.jsonl")
    imagined = [r["imagined_success"] for r in history if "imagined_success" in r]
    return {
        "start_states": int((~judged_done).sum()),
        "start_states_judged_done": int(judged_done.sum()),
        "updates": config.rl.updates,
        "imagined_success_first": imagined[0],
        "imagined_success_last": imagined[-1],
        "imagined_chunks": len(imagined) * config.rl.start_states * config.rl.branch_chunks,
    }


@contextlib.contextmanager
def _world(
    config: Config, workspace: Workspace, episodes: Sequence[Episode]
) -> Iterator[tuple[WorldModel, Params]]:
    """The world that branches are rolled out in, and its parameters for inference."""
    if config.rl.world == "simulator":
        with make_pool(config) as pool:
            yield SimulatedWorld(pool, episodes, config.rl.branch_chunks), {}
    elif config.rl.world == "world_model":
        world = build_world_model(config)
        layout = make_mesh(config.parallel.fsdp), config.parallel.rules
        directory = workspace.directory("world_model") / "world_model"
        yield world, world.for_inference(load_params(directory, abstract_params(world, *layout)))
    else:
        raise StageError(f"rl.world is {config.rl.world!r}; choose 'world_model' or 'simulator'")


def done_at_start(
    config: Config, world: WorldModel, world_params: Params, starts: Source
) -> np.ndarray:
    """Whether the world model judges the task done already, bool [N]: a branch from such a state
    would succeed whatever the policy does."""
    judge, size = jax.jit(world_metrics.judge(world)), config.rl.imagination_batch
    done = []
    for rows in np.resize(np.arange(len(starts)), (-(-len(starts) // size), size)):
        batch = collate([starts[row] for row in rows])
        done.append(np.asarray(judge(world_params, batch)))
    found = np.concatenate([*done, np.zeros(0)])[: len(starts)]
    return found > (config.rl.reward_threshold or 0.5)


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
        trainable: which of the actor's parameters move (see `PPO`).

    Returns:
        the improved {"actor", "critic"} parameters.

    Raises:
        FloatingPointError: three updates in a row were not finite; see `NonFiniteGuard`.
        Interrupted: SIGTERM came; the state is saved.
        OSError: a checkpoint cannot be written; earlier ones are kept.
        StageError: there are no start states.
    """
    rl = config.rl
    mesh, rules = make_mesh(config.parallel.fsdp), config.parallel.rules
    ppo = make_ppo(config, policy, trainable)
    shardings = parameter_sharding(jax.eval_shape(ppo.init, params), mesh, rules)
    state = jax.jit(ppo.init, out_shardings=shardings)(jax.device_put(params, shardings.params))
    at_rest = frozen_weight_sharding(world_params, mesh, rules, config.parallel.world_model)[0]
    world_params = jax.device_put(world_params, at_rest)
    refill, revalue, agreement, update = programs(config, policy, world, ppo, mesh, shardings)
    key = jax.random.key(stream(config.seed, "improve"))
    starts = _precomputed(config, world, world_params, starts, mesh)

    def starts_at(i: int):
        drawn = batches(
            starts,
            rl.start_states // rl.group_size,
            stream(config.seed, "improve_starts"),
            start_step=i // rl.updates_per_refill,
        )
        groups = jax.tree.map(lambda x: np.repeat(x, rl.group_size, axis=0), next(drawn))
        return shard_batch(groups, mesh)

    def anchors_at(i: int):
        if not rl.anchor_weight:
            return None
        seed = stream(config.seed, "improve_anchors")
        drawn = batches(demonstrated, rl.anchor_batch, seed, start_step=i)
        return shard_batch(next(drawn), mesh)

    with (
        deferred() as asked_to_stop,
        Checkpoints(
            directory / "checkpoints",
            {**(origin or {}), "seed": config.seed},
            config.checkpoints.keep,
            best="imagined_success",
        ) as checkpoints,
        StepProfiler(directory, config.profile_steps) as profiler,
    ):
        progress: dict = {"skipped_in_a_row": 0}
        if checkpoints.latest_step() is not None:
            shapes = jax.eval_shape(refill, state.params, world_params, starts_at(0), key)
            branch = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                shapes,
                branch_sharding(shapes, mesh),
            )
            like = {"state": state, "branch": branch}
            restored, progress = checkpoints.restore(like)
            state, branch = restored["state"], restored["branch"]
        first = saved = int(state.step)
        guard = NonFiniteGuard(directory, "policy optimisation", progress["skipped_in_a_row"])
        with MetricWriter(directory, first, config.loggers) as writer:
            bar = tqdm(range(first, rl.updates), desc="policy optimisation", initial=first)
            bar.total = rl.updates
            for i in bar:
                scalars, imagined = {}, None
                profiler.before(i)
                if i % rl.updates_per_refill == 0:
                    fresh = jax.random.fold_in(key, i)
                    branch = refill(state.params, world_params, starts_at(i), fresh)
                    scalars |= (imagined := _branch_metrics(branch))
                    scalars |= jax.tree.map(float, agreement(state.params, branch))
                elif i % rl.value_recompute_every == 0:
                    branch = revalue(state.params, branch)
                stop = asked_to_stop(i)
                if stop or (imagined and i - saved >= rl.checkpoint_every):
                    # Either is done again from this state, with the same result.
                    progress = {"skipped_in_a_row": guard.in_a_row}
                    checkpoints.save(i, {"state": state, "branch": branch}, progress, imagined)
                    saved = i
                if stop:
                    checkpoints.wait()
                    raise Interrupted(f"policy optimisation: stopped by SIGTERM, saved at {i}")
                update_key = jax.random.fold_in(key, 2 * rl.updates + i)
                state, metrics = update(state, branch, update_key, anchors_at(i))
                profiler.after(i, state)
                guard.add(i, branch, metrics["skipped"])
                scalars |= {k: float(v) for k, v in jax.device_get(metrics).items()}
                writer.write(i, scalars)
                guard.settle()
                bar.set_postfix(
                    kl=f"{scalars['approx_kl']:.4f}", value_error=f"{scalars['value_error']:.3f}"
                )
    return state.params


def _precomputed(
    config: Config, world: WorldModel, world_params: Params, starts: Source, mesh: Mesh
) -> Source:
    """Records (observation, what the world model precomputes of it): branches start from each
    observation several times, and the world model stays as it is."""
    if not len(starts):
        raise StageError(
            "no frame of the training episodes is a state to start branches from: collect more "
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
    # One shape, hence one compilation: the last batch is filled up with earlier records.
    parts = np.resize(np.arange(len(starts)), (-(-len(starts) // size), size))
    found = []
    for i, rows in enumerate(tqdm(parts, desc="encoding start states")):
        batch = collate([starts[row] for row in rows[process_rows(size)]])
        key = jax.random.fold_in(jax.random.key(stream(config.seed, "improve_encoding")), i)
        found.append(jax.device_get(precompute(world_params, shard_batch(batch, mesh), key)))
    everything = jax.tree.map(lambda *x: np.concatenate(x), *found)

    def record(row):
        return starts[row], jax.tree.map(lambda x: x[row], everything)

    return Source(record, np.arange(len(starts))[:, None])


def make_ppo(config: Config, policy: Policy, trainable: Params | None = None) -> PPO:
    """The updates that `config.rl` describes; `trainable` as in `PPO`."""
    rl = config.rl
    return PPO(
        policy,
        actor_lr=rl.actor_lr,
        critic_lr=rl.critic_lr,
        weight_decay=rl.weight_decay,
        grad_clip=rl.grad_clip,
        clip_ratio=rl.clip_ratio,
        value_clip=rl.value_clip,
        huber_delta=rl.huber_delta,
        critic_warmup=rl.critic_warmup,
        dual_clip=rl.dual_clip,
        anchor_weight=rl.anchor_weight,
        trainable=trainable,
        gradient_accumulation=rl.gradient_accumulation,
    )


def programs(
    config: Config, policy: Policy, world: WorldModel, ppo: PPO, mesh: Mesh, shardings: PPOState
):
    """The compiled programs of the loop.

    Args:
        shardings: of the state that `update` takes (and whose buffers it reuses).

    Returns:
        refill: `(params, world_params, (start, precomputed), key) -> Branch`. revalue: `(params,
            Branch) -> Branch`, with the current critic's values. agreement: `(params, Branch) ->
            metrics`, see `gradient_agreement`; none of a refill too small to halve. update:
            `(PPOState, Branch, key, demonstrations or None) -> (PPOState, metrics)`.

    Raises:
        ValueError: sizes of the `rl` section that do not divide each other or the devices.
    """
    rl, parallel = config.rl, config.parallel
    discount, reward_weight = chunk_discount(rl.discount, config.chunk, rl.discount_per)
    chunks = rl.start_states * rl.branch_chunks
    minibatch = min(rl.minibatch_size, chunks)
    _check_divides("rl.imagination_batch", rl.imagination_batch, mesh.size)
    _check_divides("rl.start_states", rl.start_states, rl.imagination_batch)
    _check_divides("rl.minibatch_size", minibatch, mesh.size * rl.gradient_accumulation)
    _check_divides("rl.start_states", rl.start_states, mesh.size * rl.group_size)
    if rl.exchange_advantages and rl.start_states < 2 * mesh.size * rl.group_size:
        raise ValueError("rl.exchange_advantages needs two groups or more on every device")
    slices = rl.start_states // rl.imagination_batch

    def advantages(branch: Branch) -> Branch:
        branch = with_advantages(branch, discount, rl.gae_lambda, rl.group_size)
        return exchanged(branch, rl.group_size) if rl.exchange_advantages else branch

    def imagine_rows(params, world_params, start, rows, key):
        def branch_from(start, keys, precomputed):
            return imagine(
                policy,
                world,
                params,
                world_params,
                start,
                keys,
                precomputed,
                chunks=rl.branch_chunks,
                reward_threshold=rl.reward_threshold,
                reward_weight=reward_weight,
            )

        keys = branch_keys(key, rows)
        start, precomputed = start
        branch = imagine_in_microbatches(branch_from, start, keys, precomputed, slices=slices)
        return advantages(branch)

    def revalue_rows(params, branch):
        return advantages(recompute_values(policy, params, branch, slices))

    spread = partial(map_rows, mesh=mesh, how=parallel.rollout, out_axes=ROW_AXES)
    imagine_all = spread(imagine_rows, in_axes=(None, None, 0, 0, None))
    revalue = spread(revalue_rows, in_axes=(None, ROW_AXES))

    def refill(params, world_params, start, key) -> Branch:
        _, in_use = frozen_weight_sharding(world_params, mesh, parallel.rules, parallel.world_model)
        rows = shard_batch(process_rows(rl.start_states), mesh)
        return imagine_all(params, jax.device_put(world_params, in_use), start, rows, key)

    def update(
        state: PPOState, branch: Branch, key, anchors: Demonstration | None = None
    ) -> tuple[PPOState, dict[str, Array]]:
        batch = learning_batch(branch, rl.normalize_advantages)
        rows = jax.random.permutation(key, chunks)[:minibatch]
        chosen = jax.tree.map(lambda x: x[rows], batch)
        chosen = jax.lax.with_sharding_constraint(chosen, batch_sharding(mesh))
        return ppo.update(state, chosen, anchors, key)

    unit = mesh.size * rl.gradient_accumulation
    half = min(minibatch, chunks // 2) // unit * unit

    def agreement(params, branch):
        if not half:
            return {}
        batch = learning_batch(branch, rl.normalize_advantages)
        halves = [
            jax.tree.map(lambda x, at=at: x[at : at + half], batch) for at in (0, chunks // 2)
        ]
        halves = jax.lax.with_sharding_constraint(halves, batch_sharding(mesh))
        return {"gradient_agreement": gradient_agreement(ppo, params, *halves)}

    update = on_mesh(skip_nonfinite(update), mesh)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    return refill, revalue, jax.jit(on_mesh(agreement, mesh)), update


def branch_sharding(branch: Branch, mesh: Mesh) -> Branch:
    """Branches split over all devices."""
    return jax.tree.map(
        lambda axis, part: jax.tree.map(lambda _: batch_sharding(mesh, axis), part),
        ROW_AXES,
        branch,
    )


def _check_divides(name: str, size: int, multiple: int) -> None:
    if size % multiple:
        raise ValueError(f"{name} = {size} is not a multiple of {multiple}")


@jax.jit
def _branch_statistics(branch: Branch) -> dict[str, Array]:
    return {
        "imagined_success": 1.0 - jnp.prod(1.0 - branch.done, axis=0).mean(),
        "imagined_return": (branch.reward * branch.valid).sum(0).mean(),
        "imagined_value": (branch.value * branch.valid).sum() / branch.valid.sum(),
        "imagined_advantage_std": jnp.sqrt((jnp.square(branch.advantage[0])).mean()),
        "imagined_action_size": jnp.abs(branch.actions).mean(),
    }


def _branch_metrics(branch: Branch) -> dict[str, float]:
    return {k: float(v) for k, v in jax.device_get(_branch_statistics(branch)).items()}
