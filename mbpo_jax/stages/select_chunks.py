"""Stage `selection`: the fine-tuned policy acting on the best, the worst and a random one of some
chunks, from the same random resets: what the world model and the value know."""

from pathlib import Path

from mbpo_jax.selection import CHOICES
from mbpo_jax.stages.acting import load_selection
from mbpo_jax.stages.build import load_policy
from mbpo_jax.stages.evaluate import reset_requests, run_actors
from mbpo_jax.stages.simulation import make_pool
from mbpo_jax.stages.workspace import StageError, Workspace


def select_chunks(workspace: Workspace, directory: Path) -> dict:
    """Runs these ways of acting, and the policy as it acts alone ("sampled"); writes
    `episodes_*.jsonl`. "paired_resets" compares the worst chunk with the others.

    Raises:
        StageError: there is nothing to choose among.
    """
    config = workspace.config
    workspace.require("value")
    if config.evaluation.best_of < 2:
        raise StageError(f"evaluation.best_of is {config.evaluation.best_of}: 2 or more chunks")
    sft = workspace.directory("sft")
    policy, params = load_policy(config, sft, sft / "policy")
    actors = {
        choice: load_selection(config, workspace.root, sft / "policy", choice) for choice in CHOICES
    }
    actors["sampled"] = policy.act, params
    requests = reset_requests(config, config.selection.resets_per_task)
    with make_pool(config) as pool:
        return run_actors(config, pool, actors, requests, directory)
