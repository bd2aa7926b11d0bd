"""Stage `improve`: PPO on branches imagined by the world model, or `rank_chunks`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import Source, branch_starts, collate, demonstrations, equal_parts
from mbpo_jax.envs.simulated_world import SimulatedWorld
from mbpo_jax.episode import Episode
from mbpo_jax.mbpo import MBPO
from mbpo_jax.stages.build import (
    Config,
    abstract_params,
    build_policy,
    build_world_model,
    checkpoint_origin,
    observation_builder,
)
from mbpo_jax.stages.finetune_world_model import world_model_episodes
from mbpo_jax.stages.optimize_policy import optimize_policy
from mbpo_jax.stages.rank_chunks import finetune_on_best
from mbpo_jax.stages.simulation import make_pool
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.training.metrics import read_metrics
from mbpo_jax.training.sharding import make_mesh
from mbpo_jax.types import Params, WorldModel
from mbpo_jax.world_model import metrics as world_metrics


def improve_policy(
    workspace: Workspace, directory: Path, algorithm: Callable[..., MBPO] = MBPO
) -> dict:
    """Improves the fine-tuned policy without touching the simulator; writes `policy/`. With the
    `rl.method` "ppo" `algorithm` makes the `MBPO` that computes advantages, losses and updates."""
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
    # States that the policy itself comes into.
    episodes, _ = world_model_episodes(workspace, ["rollouts"])
    if config.rl.method == "ranked":  # and as many that it was shown
        shown, _ = world_model_episodes(workspace, ["demonstrations"])
        episodes += shown[: len(episodes)]
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
        starts = starts.where(~judged_done)
        arguments = config, policy, world, params, world_params, starts
        common = {
            "directory": directory,
            "origin": checkpoint_origin(
                config, ["policy", "rl"], {name: vars(x) for name, x in stats.items()}
            ),
            "trainable": policy.trainable(params)["actor"],
        }
        if config.rl.method == "ranked":
            improved, summary = finetune_on_best(*arguments, **common)
        else:
            shown = demonstrations(demonstrated, builder)
            improved = optimize_policy(*arguments, shown, **common, algorithm=algorithm)
            summary = _ppo_summary(config, directory)
    save_params(directory / "policy", improved)
    return summary | {
        "start_states": len(starts),
        "start_states_judged_done": int(judged_done.sum()),
    }


def _ppo_summary(config: Config, directory: Path) -> dict:
    history = read_metrics(directory / "metrics.jsonl")
    imagined = [r["imagined_success"] for r in history if "imagined_success" in r]
    return {
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
    for rows in equal_parts(len(starts), size):
        batch = collate([starts[row] for row in rows])
        done.append(np.asarray(judge(world_params, batch)))
    found = np.concatenate([*done, np.zeros(0)])[: len(starts)]
    return found > (config.rl.reward_threshold or 0.5)
