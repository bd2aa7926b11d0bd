"""PPO in the simulator itself (πRL, arXiv 2510.25889): whole episodes from the resets of the
rollouts, nothing of which is used but where they began. The critic is a fresh one."""

from pathlib import Path

import numpy as np

from experiments.compare.recorded import fine_tuned
from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.pipelines import branch_starts, demonstrations
from mbpo_jax.envs.simulated_world import SimulatedWorld
from mbpo_jax.stages.build import Config, checkpoint_origin, observation_builder
from mbpo_jax.stages.optimize_policy import optimize_policy
from mbpo_jax.stages.simulation import make_pool
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.checkpoints import save_params
from mbpo_jax.training.metrics import read_metrics


def train(workspace: Workspace, directory: Path) -> dict:
    """Policy optimisation in the simulator; writes `policy/`."""
    config = workspace.config
    policy, params = fine_tuned(workspace)
    builder = observation_builder(config)
    rollouts = read_episodes(workspace.directory("rollouts") / "dataset")
    shown = read_episodes(workspace.directory("demonstrations") / "dataset")
    with make_pool(config) as pool:
        world = SimulatedWorld(pool, rollouts, config.rl.branch_chunks)
        starts = branch_starts(rollouts, builder)
        starts = starts.where(starts.index[:, 1] == 0)
        starts = starts.where(np.array([world.knows(x) for x in starts], bool))
        improved = optimize_policy(
            config,
            policy,
            world,
            params,
            {},
            starts,
            demonstrations(shown, builder),
            directory=directory,
            origin=checkpoint_origin(config, ["policy", "rl"], {}),
            trainable=policy.trainable(params)["actor"],
        )
    save_params(directory / "policy", improved)
    history = read_metrics(directory / "metrics.jsonl")
    success = [r["imagined_success"] for r in history if "imagined_success" in r]
    return {"episodes": len(success) * config.rl.start_states, "success_by_refill": success}


def with_episodes(config: Config, factor: int = 1) -> Config:
    """The config (unlocked) whose policy optimisation takes `factor` times as many whole episodes
    in the simulator as there are rollouts, in at most `compare.online.refills` · `factor` equal
    refills, and as many updates on each as there were."""
    budget = config.rollouts.episodes_per_task * len(config.tasks)
    most = min(config.compare.online.refills, budget)
    refills = max(n for n in range(1, most + 1) if budget % n == 0)
    rl = config.rl
    rl.world, rl.start_states_from = "simulator", "episode_start"
    rl.branch_chunks = config.max_steps // config.chunk
    rl.group_size = 1  # nobody resets a robot to the same state sixteen times
    rl.start_states = rl.imagination_batch = budget // refills
    rl.minibatch_size = min(rl.minibatch_size, rl.start_states * rl.branch_chunks)
    rl.minibatch_size -= rl.minibatch_size % rl.gradient_accumulation
    rl.updates = refills * factor * rl.updates_per_refill
    return config
