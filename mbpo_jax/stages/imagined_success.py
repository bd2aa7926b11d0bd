"""Stage `imagine`: both policies inside the world model, from states that it was not trained on.

This is what can be said of a policy without a robot. It is no measurement of success on one.
"""

from pathlib import Path

import jax
import numpy as np

from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import branch_starts, collate
from mbpo_jax.mbpo import imagine
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import build_policy, load_policy, load_world_model, observation_builder
from mbpo_jax.stages.finetune_world_model import world_model_episodes
from mbpo_jax.stages.imagination import branch_keys
from mbpo_jax.stages.statistics import mcnemar_exact, success_rate
from mbpo_jax.stages.workspace import StageError, Workspace

START_STATES = 128


def imagine_held_out(workspace: Workspace, directory: Path) -> dict:
    """Shares of branches of `world_model.horizon` chunks from held-out states that end in imagined
    success, with their 95 % Wilson intervals, and both policies paired by state.

    Raises:
        StageError: no episodes were held out.
    """
    config = workspace.config
    for stage in ("sft", "world_model", "improve"):
        workspace.require(stage)
    world, world_params = load_world_model(config, workspace.root)
    _, held_out = world_model_episodes(workspace)
    states = branch_starts(held_out, observation_builder(config))
    if not len(states):
        raise StageError("no states are held out; raise --config.world_model.holdout_fraction")
    wanted = np.linspace(0, len(states) - 1, START_STATES).round().astype(int)
    sft = workspace.directory("sft")
    policy = build_policy(config, read_norm_stats(sft / "norm_stats.json"))

    @jax.jit
    def success(params, world_params, start, keys):
        branch = imagine(
            policy,
            world,
            params,
            world_params,
            start,
            keys,
            chunks=config.world_model.horizon,
            reward_threshold=config.rl.reward_threshold or 0.5,
        )
        return (branch.reward > 0).any(0)

    succeeded = {}
    for name, stage in (("sft", "sft"), ("improved", "improve")):
        _, params = load_policy(config, sft, workspace.directory(stage) / "policy")
        parts = []
        for i in range(0, START_STATES, config.rl.imagination_batch):
            rows = np.arange(i, min(i + config.rl.imagination_batch, START_STATES))
            start = collate([states[j] for j in wanted[rows]])
            keys = branch_keys(jax.random.key(stream(config.seed, "imagined_success")), rows)
            parts.append(np.asarray(success(params, world_params, start, keys)))
        succeeded[name] = np.concatenate(parts)
    sft, improved = succeeded["sft"], succeeded["improved"]
    first, second = int((sft & ~improved).sum()), int((improved & ~sft).sum())
    return {
        "held_out_episodes": len(held_out),
        "start_states": START_STATES,
        "chunks": config.world_model.horizon,
        "policies": {name: success_rate(int(x.sum()), len(x)) for name, x in succeeded.items()},
        "paired": {
            "sft_only": first,
            "improved_only": second,
            "p_value": mcnemar_exact(first, second),
        },
    }
