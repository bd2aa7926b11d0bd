"""SFT that goes on from the fine-tuned policy: the controls that optimisation has to beat."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from experiments.compare.recorded import fine_tuned, placed
from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.pipelines import Source, batches, branch_starts, demonstrations
from mbpo_jax.files import atomic_write
from mbpo_jax.mbpo import imagine
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    build_world_model,
    checkpoint_origin,
    observation_builder,
)
from mbpo_jax.stages.finetune_policy import imitate
from mbpo_jax.stages.finetune_world_model import world_model_episodes
from mbpo_jax.stages.imagination import branch_keys
from mbpo_jax.stages.improve_policy import done_at_start
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.training.run import Run
from mbpo_jax.types import Branch, Demonstration, Params


def on_rollouts(workspace: Workspace, directory: Path) -> dict:
    """Demonstrations and the rollouts that succeeded, in one pool; writes `policy/`."""
    policy, params = fine_tuned(workspace)
    rollouts = read_episodes(workspace.directory("rollouts") / "dataset")
    successes = [episode for episode in rollouts if episode.success]
    episodes = read_episodes(workspace.directory("demonstrations") / "dataset") + successes
    pool = demonstrations(episodes, observation_builder(workspace.config))
    continue_sft(workspace, directory, policy, params, [pool])
    return {"successful_rollouts": len(successes), "frames": len(pool)}


def in_world_model(workspace: Workspace, directory: Path) -> dict:
    """Demonstrations, and in equal shares the imagined chunks that led to what the world model
    judges a success, as many chunks having been imagined as for policy optimisation; writes
    `policy/` and `imagined/`, whose finished parts are kept."""
    config, rl = workspace.config, workspace.config.rl
    policy, params = fine_tuned(workspace)
    builder = observation_builder(config)
    shown = demonstrations(
        read_episodes(workspace.directory("demonstrations") / "dataset"), builder
    )
    episodes, _ = world_model_episodes(workspace)
    refills = math.ceil(rl.updates / rl.updates_per_refill)
    count = refills * rl.start_states // rl.imagination_batch
    chosen = imagined_successes(
        workspace, policy, params, branch_starts(episodes, builder), count, directory
    )
    sources = [shown, chosen] if len(chosen) else [shown]
    continue_sft(workspace, directory, policy, params, sources)
    return {
        "imagined_chunks": count * rl.imagination_batch * rl.branch_chunks,
        "chunks_to_success": len(chosen),
    }


def imagined_successes(
    workspace: Workspace,
    policy: FlowPolicy,
    params: Params,
    starts: Source,
    count: int,
    directory: Path,
) -> Source:
    """Of `count` batches of branches, the chunks of those that end in success, as
    `Demonstration`s."""
    config, rl = workspace.config, workspace.config.rl
    world = build_world_model(config)
    world_params = world.for_inference(
        load_params(workspace.directory("world_model") / "world_model", placed(config, world))
    )
    starts = starts.where(~done_at_start(config, world, world_params, starts))
    drawn = batches(starts, rl.imagination_batch, stream(config.seed, "imagined_imitation_starts"))
    key = jax.random.key(stream(config.seed, "imagined_imitation"))
    params = jax.jit(policy.for_inference)(params)

    @jax.jit
    def branches_from(params, world_params, start, rows):
        return imagine(
            policy,
            world,
            params,
            world_params,
            start,
            branch_keys(key, rows),
            chunks=rl.branch_chunks,
            reward_threshold=rl.reward_threshold or 0.5,
        )

    (directory / "imagined").mkdir(exist_ok=True)
    found = []
    for i in tqdm(range(count), desc="imagined branches", unit="batch"):
        start = next(drawn)
        path = directory / "imagined" / f"{i:05d}.npz"
        if not path.exists():
            rows = i * rl.imagination_batch + np.arange(rl.imagination_batch)
            branch = branches_from(params, world_params, start, rows)
            chunks = successful_chunks(jax.device_get(branch))
            with atomic_write(path, "wb") as file:
                np.savez(file, *jax.tree.leaves(chunks))
        found.append(_load(path, start))
    found = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    rows = np.arange(len(found.actions))[:, None]
    return Source(lambda row: jax.tree.map(lambda x: x[row], found), rows)


def successful_chunks(branch: Branch) -> Demonstration:
    """The chunks of branches [n, M] that end in success, up to that end, with leading axis [N]."""
    chosen = (branch.mask > 0) & (branch.done > 0).any(0)
    observation, actions = jax.tree.map(
        lambda x: np.asarray(x)[chosen], (branch.observation, branch.actions)
    )
    return Demonstration(observation, actions, np.ones(len(actions), np.float32))


def _load(path: Path, start) -> Demonstration:
    """`start`: an observation of the same structure."""
    like = Demonstration(start, 0, 0)
    with np.load(path) as file:
        leaves = [file[f"arr_{i}"] for i in range(len(file.files))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def continue_sft(
    workspace: Workspace,
    directory: Path,
    policy: FlowPolicy,
    params: Params,
    sources: Sequence[Source],
) -> None:
    """Flow matching on `Demonstration`s, in equal shares, as long and as fast as the method
    "ranked" learns from its own; writes `policy/`."""
    config = workspace.config
    origin = checkpoint_origin(config, ["policy", "rl.ranked"], {})
    actor = imitate(
        policy,
        params["actor"],
        sources,
        config.rl.ranked,
        stream(config.seed, "imitation_batches"),
        Run.of(config, directory.parent.name, directory, stream(config.seed, "imitation"), origin),
        policy.trainable(params)["actor"],
    )
    save_params(directory / "policy", {**params, "actor": actor})
