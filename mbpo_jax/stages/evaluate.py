"""Stage `evaluate`: both policies in the simulator on the same fixed init states."""

import json
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from mbpo_jax.envs.pool import EnvPool
from mbpo_jax.envs.recording import VIDEO_STRIDE
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.suites import task_info
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.stages.build import Config, load_policy
from mbpo_jax.stages.collect import batched_act, make_pool, progress
from mbpo_jax.stages.statistics import mcnemar_exact, wilson_interval
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.metrics import continue_records, read_metrics
from mbpo_jax.types import Params


def evaluate(workspace: Workspace, directory: Path) -> dict:
    """Runs the fine-tuned and the improved policy; writes `episodes_*.jsonl` and videos."""
    config = workspace.config
    workspace.require("sft")
    workspace.require("improve")
    sft = workspace.directory("sft")
    results, restarts = {}, 0
    with make_pool(config) as pool:
        requests = _requests(config)
        for name, trained in (("sft", sft), ("improved", workspace.directory("improve"))):
            policy, params = load_policy(config, sft, trained / "policy")
            path = directory / f"episodes_{name}.jsonl"
            started = time.monotonic()
            _run(config, pool, policy, params, requests, path, name)
            seconds = time.monotonic() - started
            results[name] = summarize(read_metrics(path), config.tasks) | {"minutes": seconds / 60}
        videos = _film(config, pool, policy, params, requests, directory)
        restarts = pool.restarts
    return {
        "policies": results,
        "paired": paired_comparison(
            read_metrics(directory / "episodes_sft.jsonl"),
            read_metrics(directory / "episodes_improved.jsonl"),
        ),
        "videos": videos,
        "worker_restarts": restarts,
    }


def _requests(config: Config) -> list[EpisodeRequest]:
    requests = []
    for task in config.tasks:
        fixed = task_info(config.suite, task).num_init_states
        wanted = config.evaluation.episodes_per_task
        if wanted > fixed:
            raise StageError(
                f"evaluation.episodes_per_task = {wanted}, but task {task} has only {fixed} "
                "fixed init states"
            )
        requests += [
            EpisodeRequest(
                task_id=task, init_state_id=i, max_steps=config.max_steps, success_frames=1
            )
            for i in range(wanted)
        ]
    return requests


def _run(
    config: Config,
    pool: EnvPool,
    policy: FlowPolicy,
    params: Params,
    requests: list[EpisodeRequest],
    path: Path,
    name: str,
) -> None:
    """Appends a line per finished episode, so that a killed evaluation continues."""
    records = read_metrics(path)
    finished = {(r["task"], r["init_state"]) for r in records}
    missing = [r for r in requests if (r.task_id, r.init_state_id) not in finished]
    act = batched_act(config, policy, params)
    with continue_records(path, records) as file:
        results = pool.policy_episodes(missing, act, source=name)
        for result in progress(results, f"evaluation, {name} policy", len(missing)):
            record = {
                "task": result.request.task_id,
                "init_state": result.request.init_state_id,
                "success": bool(result.episode.success),
                "length": int(result.episode.length),
                "goal_fraction": float(result.episode.goal_fraction),
                "seconds": result.seconds,
            }
            file.write(json.dumps(record) + "\n")


def summarize(episodes: list[dict], tasks) -> dict:
    """Success with its 95 % Wilson interval, overall and per task."""

    def part(chosen):
        successes = sum(e["success"] for e in chosen)
        low, high = wilson_interval(successes, len(chosen))
        solved = [e["length"] for e in chosen if e["success"]]
        return {
            "episodes": len(chosen),
            "successes": successes,
            "success_rate": successes / len(chosen),
            "interval": [low, high],
            "goal_fraction": float(np.mean([e["goal_fraction"] for e in chosen])),
            "mean_length": float(np.mean([e["length"] for e in chosen])),
            "mean_length_of_successes": float(np.mean(solved)) if solved else None,
            "seconds_per_episode": float(np.mean([e["seconds"] for e in chosen])),
        }

    per_task = {str(t): part([e for e in episodes if e["task"] == t]) for t in tasks}
    return part(episodes) | {"tasks": per_task}


def paired_comparison(first: list[dict], second: list[dict]) -> dict:
    """Exact McNemar test on the episodes that both policies started from the same init state."""
    outcome = {(e["task"], e["init_state"]): e["success"] for e in first}
    pairs = [
        (outcome[key], e["success"])
        for e in second
        if (key := (e["task"], e["init_state"])) in outcome
    ]
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    return {
        "pairs": len(pairs),
        "both": sum(a and b for a, b in pairs),
        "sft_only": first_only,
        "improved_only": second_only,
        "neither": sum(not a and not b for a, b in pairs),
        "p_value": mcnemar_exact(first_only, second_only),
    }


def _film(
    config: Config,
    pool: EnvPool,
    policy: FlowPolicy,
    params: Params,
    requests: list[EpisodeRequest],
    directory: Path,
) -> dict:
    """Repeats the improved policy's first success and first failure with the camera on."""
    episodes = {
        (e["task"], e["init_state"]): e for e in read_metrics(directory / "episodes_improved.jsonl")
    }
    videos = {}
    for kind, wanted in (("success", True), ("failure", False)):
        chosen = [r for r in requests if episodes[r.task_id, r.init_state_id]["success"] == wanted]
        if not chosen:
            continue
        request = EpisodeRequest(
            task_id=chosen[0].task_id,
            init_state_id=chosen[0].init_state_id,
            max_steps=config.max_steps,
            success_frames=1,
            video_size=config.evaluation.video_size,
        )
        act = batched_act(config, policy, params)
        (result,) = pool.policy_episodes([request], act, source="improved")
        frames = np.concatenate([result.video[c] for c in config.cameras], axis=2)
        path = directory / f"{kind}.gif"
        iio.imwrite(path, frames, duration=1000 * VIDEO_STRIDE / config.robot.control_hz, loop=0)
        videos[kind] = {
            "file": path.name,
            "task": request.task_id,
            "init_state": request.init_state_id,
            "repeated_outcome": bool(result.episode.success),
        }
    return videos
