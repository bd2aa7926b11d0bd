"""Stage `evaluate`: both policies in the simulator from the same starts."""

import json
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from mbpo_jax import seeds
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim.recording import VIDEO_STRIDE
from mbpo_jax.envs.suites import task_info
from mbpo_jax.envs.workers.pool import EnvPool
from mbpo_jax.stages.build import Act, Config, load_policy, load_selection
from mbpo_jax.stages.collect import batched_act, make_pool, progress
from mbpo_jax.stages.statistics import mcnemar_exact, wilson_interval
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.metrics import continue_records, read_metrics
from mbpo_jax.types import Params


def evaluate(workspace: Workspace, directory: Path) -> dict:
    """Runs the fine-tuned and the improved policy, and the improved one choosing among
    `evaluation.best_of` chunks; writes `episodes_*.jsonl` and videos."""
    config = workspace.config
    workspace.require("sft")
    workspace.require("improve")
    if config.evaluation.best_of < 1:
        raise StageError(f"evaluation.best_of is {config.evaluation.best_of}: 1 or more chunks")
    sft, improved = (workspace.directory(stage) for stage in ("sft", "improve"))
    actors = {}
    for name, trained in (("sft", sft), ("improved", improved)):
        policy, params = load_policy(config, sft, trained / "policy")
        actors[name] = policy.act, params
    if config.evaluation.best_of > 1:
        actors["improved_best"] = load_selection(config, workspace.root, improved / "policy")
    with make_pool(config) as pool:
        results = run_actors(config, pool, actors, start_requests(config), directory)
        videos = _film(config, pool, *actors["improved"], directory)
        restarts = pool.restarts
    return {**results, "videos": videos, "worker_restarts": restarts}


def run_actors(
    config: Config,
    pool: EnvPool,
    actors: dict[str, tuple[Act, Params]],
    requests: list[EpisodeRequest],
    directory: Path,
) -> dict:
    """Every way of acting from the same starts: "policies" (from fixed init states) and "resets"
    (from random ones), name -> `summarize`; "paired" and "paired_resets", the first actor against
    each other one."""
    records = {}
    for name, (act, params) in actors.items():
        path = directory / f"episodes_{name}.jsonl"
        started = time.monotonic()
        _run(config, pool, act, params, requests, path, name)
        print(f"[evaluate] {name}: {(time.monotonic() - started) / 60:.1f} min", flush=True)
        records[name] = read_metrics(path)
    first, *others = actors

    def kind(name, resets):
        return [e for e in records[name] if (e["init_state"] < 0) == resets]

    results = {}
    for key, pairs, resets in (("policies", "paired", False), ("resets", "paired_resets", True)):
        if kind(first, resets):
            results[key] = {n: summarize(kind(n, resets), config.tasks) for n in actors}
            results[pairs] = {
                n: paired_comparison(kind(first, resets), kind(n, resets)) for n in others
            }
    return results


def reset_requests(config: Config, per_task: int) -> list[EpisodeRequest]:
    """Episodes from random resets that nothing else uses, for every task."""
    return [
        EpisodeRequest(
            task_id=task,
            seed=seeds.reset(config.seed, "evaluation", i),
            max_steps=config.max_steps,
            render_every=config.chunk,
            success_frames=1,
        )
        for task in config.tasks
        for i in range(per_task)
    ]


def start_requests(config: Config) -> list[EpisodeRequest]:
    """The episodes of an evaluation: from shipped init states, then from random resets.

    Raises:
        StageError: a task has fewer init states than are asked for.
    """
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
                task_id=task,
                init_state_id=i,
                max_steps=config.max_steps,
                render_every=config.chunk,
                success_frames=1,
            )
            for i in range(wanted)
        ]
    return requests + reset_requests(config, config.evaluation.resets_per_task)


def _start(record: dict) -> tuple[int, int, int]:
    return record["task"], record["init_state"], record.get("seed", -1)


def _run(
    config: Config,
    pool: EnvPool,
    act: Act,
    params: Params,
    requests: list[EpisodeRequest],
    path: Path,
    name: str,
) -> None:
    """Appends a line per finished episode, so that a killed evaluation continues."""
    records = read_metrics(path)
    finished = {_start(r) for r in records}
    missing = [r for r in requests if (r.task_id, r.init_state_id, r.seed) not in finished]
    if not missing:
        return
    with continue_records(path, records) as file:
        results = pool.policy_episodes(missing, batched_act(config, act, params), source=name)
        for result in progress(results, f"evaluation, {name} policy", len(missing)):
            record = {
                "task": result.request.task_id,
                "init_state": result.request.init_state_id,
                "seed": result.request.seed,
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
    """Exact McNemar test on the episodes that both policies started alike."""
    outcome = {_start(e): e["success"] for e in first}
    pairs = [(outcome[key], e["success"]) for e in second if (key := _start(e)) in outcome]
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    return {
        "pairs": len(pairs),
        "both": sum(a and b for a, b in pairs),
        "first_only": first_only,
        "second_only": second_only,
        "neither": sum(not a and not b for a, b in pairs),
        "p_value": mcnemar_exact(first_only, second_only),
    }


def _film(config: Config, pool: EnvPool, act: Act, params: Params, directory: Path) -> dict:
    """Repeats the improved policy's first success and first failure from a fixed init state with
    the camera on."""
    episodes = read_metrics(directory / "episodes_improved.jsonl")
    fixed = sorted((_start(e), e["success"]) for e in episodes if e["init_state"] >= 0)
    videos = {}
    for kind, wanted in (("success", True), ("failure", False)):
        chosen = [start for start, success in fixed if success == wanted]
        if not chosen:
            continue
        task, init_state, _ = chosen[0]
        request = EpisodeRequest(
            task_id=task,
            init_state_id=init_state,
            max_steps=config.max_steps,
            render_every=config.chunk,
            success_frames=1,
            video_size=config.evaluation.video_size,
        )
        acting = batched_act(config, act, params)
        (result,) = pool.policy_episodes([request], acting, source="improved")
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
