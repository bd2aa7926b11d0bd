"""Stage `improve`: PPO on branches imagined by the world model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import Source, batches, branch_starts
from mbpo_jax.rl.gae import chunk_discount, learning_batch
from mbpo_jax.rl.imagination import imagine, imagine_in_microbatches, recompute_values
from mbpo_jax.rl.ppo import PPO, PPOState
from mbpo_jax.stages.build import (
    Config,
    abstract_params,
    build_policy,
    build_world_model,
    checkpoint_origin,
    observation_builder,
)
from mbpo_jax.stages.finetune_world_model import world_model_episodes
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import Checkpoints, load_params, save_params
from mbpo_jax.training.interruption import Interrupted, deferred
from mbpo_jax.training.metrics import MetricWriter, read_metrics
from mbpo_jax.training.nonfinite import NonFiniteGuard, skip_nonfinite
from mbpo_jax.training.profiling import StepProfiler
from mbpo_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    parameter_sharding,
    shard_batch,
)
from mbpo_jax.types import Array, Branch, Params, Policy, WorldModel


def improve_policy(workspace: Workspace, directory: Path) -> dict:
    """Improves the fine-tuned policy without touching the simulator; writes `policy/`."""
    config = workspace.config
    workspace.require("sft")
    workspace.require("world_model")
    sft = workspace.directory("sft")
    stats = read_norm_stats(sft / "norm_stats.json")
    policy = build_policy(config, stats)
    world = build_world_model(config)
    params = load_params(sft / "policy", abstract_params(policy))
    world_params = load_params(
        workspace.directory("world_model") / "world_model", abstract_params(world)
    )
    episodes, _ = world_model_episodes(workspace)
    starts = branch_starts(episodes, observation_builder(config))
    if config.rl.start_states_from == "episode_start":
        starts = starts.where(starts.index[:, 1] == 0)
    elif config.rl.start_states_from != "dataset":
        raise StageError(
            f"rl.start_states_from is {config.rl.start_states_from!r}; choose 'dataset' (branched "
            "rollouts) or 'episode_start' (full-horizon imagination)"
        )
    improved = optimize_policy(
        config,
        policy,
        world,
        params,
        world_params,
        starts,
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
        "start_states": len(starts),
        "updates": config.rl.updates,
        "imagined_success_first": imagined[0],
        "imagined_success_last": imagined[-1],
        "imagined_chunks": len(imagined) * config.rl.start_states * config.rl.branch_chunks,
    }


def optimize_policy(
    config: Config,
    policy: Policy,
    world: WorldModel,
    params: Params,
    world_params: Params,
    starts: Source,
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
        directory: receives metrics and checkpoints.
        origin: of the checkpoints, see `Checkpoints`; the seed is added.
        trainable: which of the actor's parameters move (see `PPO`).

    Returns:
        the improved {"actor", "critic"} parameters.

    Raises:
        FloatingPointError: three updates in a row were not finite; see `NonFiniteGuard`.
        Interrupted: SIGTERM came; the state is saved.
        OSError: a checkpoint cannot be written; earlier ones are kept.
    """
    rl = config.rl
    mesh = make_mesh(config.parallel.fsdp)
    ppo = PPO(
        policy,
        actor_lr=rl.actor_lr,
        critic_lr=rl.critic_lr,
        weight_decay=rl.weight_decay,
        grad_clip=rl.grad_clip,
        clip_ratio=rl.clip_ratio,
        value_clip=rl.value_clip,
        huber_delta=rl.huber_delta,
        critic_warmup=rl.critic_warmup,
        trainable=trainable,
    )
    state = ppo.init(params)
    state = jax.device_put(state, parameter_sharding(state, mesh))
    world_params = jax.device_put(world_params, parameter_sharding(world_params, mesh))
    refill, revalue, update = _programs(config, policy, world, ppo)
    key = jax.random.key(config.seed + 4)

    def starts_at(i: int):
        drawn = batches(
            starts, rl.start_states, config.seed + 5, start_step=i // rl.updates_per_refill
        )
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
                _branch_sharding(shapes, mesh),
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
                    branch = jax.device_put(branch, _branch_sharding(branch, mesh))
                    scalars |= (imagined := _branch_metrics(branch))
                elif i % rl.value_recompute_every == 0:
                    branch = revalue(state.params, branch)
                stop = asked_to_stop()
                if stop or (imagined and i - saved >= rl.checkpoint_every):
                    # Either is done again from this state, with the same result.
                    progress = {"skipped_in_a_row": guard.in_a_row}
                    checkpoints.save(i, {"state": state, "branch": branch}, progress, imagined)
                    saved = i
                if stop:
                    checkpoints.wait()
                    raise Interrupted(f"policy optimisation: stopped by SIGTERM, saved at {i}")
                state, metrics = update(state, branch, jax.random.fold_in(key, 2 * rl.updates + i))
                profiler.after(i, state)
                guard.add(i, branch, metrics["skipped"])
                scalars |= {k: float(v) for k, v in jax.device_get(metrics).items()}
                writer.write(i, scalars)
                guard.settle()
                bar.set_postfix(
                    kl=f"{scalars['approx_kl']:.4f}", value_error=f"{scalars['value_error']:.3f}"
                )
    return state.params


def _programs(config: Config, policy: Policy, world: WorldModel, ppo: PPO):
    """The three jitted programs of the loop: refill, revalue, update."""
    rl = config.rl
    discount, reward_weight = chunk_discount(rl.discount, config.chunk, rl.discount_per)
    chunks = rl.start_states * rl.branch_chunks
    minibatch = min(rl.minibatch_size, chunks)

    @jax.jit
    def refill(params, world_params, start, key) -> Branch:
        def branch_from(start, key):
            return imagine(
                policy,
                world,
                params,
                world_params,
                start,
                key,
                chunks=rl.branch_chunks,
                reward_threshold=rl.reward_threshold,
                reward_weight=reward_weight,
            )

        return imagine_in_microbatches(branch_from, start, key, rl.imagination_batch)

    @jax.jit
    def revalue(params, branch) -> Branch:
        return recompute_values(policy, params, branch, rl.imagination_batch)

    @jax.jit
    @skip_nonfinite
    def update(state: PPOState, branch: Branch, key) -> tuple[PPOState, dict[str, Array]]:
        batch = learning_batch(branch, discount, rl.gae_lambda, rl.normalize_advantages)
        rows = jax.random.permutation(key, chunks)[:minibatch]
        return ppo.update(state, jax.tree.map(lambda x: x[rows], batch))

    return refill, revalue, update


def _branch_sharding(branch: Branch, mesh: Mesh) -> Branch:
    """Branches split over all devices: the second axis, or the first after the last chunk."""
    branches = batch_sharding(mesh)
    chunks = NamedSharding(mesh, PartitionSpec(None, *branches.spec))
    return jax.tree.map(lambda _: chunks, branch).replace(
        last_observation=jax.tree.map(lambda _: branches, branch.last_observation),
        bootstrap_value=branches,
    )


@jax.jit
def _branch_statistics(branch: Branch) -> dict[str, Array]:
    succeeded = (branch.reward > 0).any(0)
    return {
        "imagined_success": succeeded.mean(),
        "imagined_return": branch.reward.sum(0).mean(),
        "imagined_value": (branch.value * branch.valid).sum() / branch.valid.sum(),
        "imagined_action_size": jnp.abs(branch.actions).mean(),
    }


def _branch_metrics(branch: Branch) -> dict[str, float]:
    return {k: float(v) for k, v in jax.device_get(_branch_statistics(branch)).items()}
