"""Stage `evaluate`: both policies in the simulator from the same starts."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from mbpo_jax import seeds
from mbpo_jax.envs.requests import EpisodeRequest, EpisodeResult
from mbpo_jax.envs.sim.recording import write_video
from mbpo_jax.envs.suites import task_info
from mbpo_jax.envs.workers.pool import EnvPool, PoolAct
from mbpo_jax.stages.acting import Act, load_selection
from mbpo_jax.stages.build import Config, load_policy
from mbpo_jax.stages.simulation import batched_act, make_pool, progress
from mbpo_jax.stages.statistics import paired_comparison, start_of, summarize
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import best_state
from mbpo_jax.training.metrics import continue_records, read_metrics
from mbpo_jax.types import Params


def evaluate(workspace: Workspace, directory: Path) -> dict:
    """Runs the fine-tuned and the improved policy, and the improved one choosing among
    `evaluation.best_of` chunks; writes `episodes_*.jsonl` and videos."""
    config = workspace.config
    workspace.require("sft")
    workspace.require("improve")
    sft, improve = (workspace.directory(stage) for stage in ("sft", "improve"))
    improved = improve / "policy"
    if config.evaluation.checkpoint == "best":
        improved = best_state(improve / "checkpoints", "imagined_success")
    actors = {}
    for name, trained in (("sft", sft / "policy"), ("improved", improved)):
        policy, params = load_policy(config, sft, trained)
        actors[name] = policy.act, params
    if config.evaluation.best_of > 1:
        actors["improved_best"] = load_selection(config, workspace.root, improved)
    with make_pool(config) as pool:
        results = run_actors(config, pool, actors, requests_of(config), directory)
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
        for _ in run_requests(pool, batched_act(config, act, params), requests, path, name):
            pass  # the file has it
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
        _request(config, task_id=task, seed=seeds.reset(config.seed, "evaluation", i))
        for task in config.tasks
        for i in range(per_task)
    ]


def _request(config: Config, **start) -> EpisodeRequest:
    steps = {"max_steps": config.max_steps, "render_every": config.chunk}
    return EpisodeRequest(**start, **steps, success_frames=1)


def requests_of(config: Config) -> list[EpisodeRequest]:
    """The episodes of `config.evaluation`, for every task: from fixed init states, then resets.

    Raises:
        StageError: a task has fewer init states than are wanted.
    """
    requests = []
    for task in config.tasks:
        fixed = task_info(config.suite, task).num_init_states
        wanted = config.evaluation.episodes_per_task
        if wanted > fixed:
            raise StageError(
                f"{wanted} episodes from fixed init states are wanted, but task {task} of "
                f"{config.suite} has {fixed} of them; take fewer, or random resets"
            )
        requests += [_request(config, task_id=task, init_state_id=i) for i in range(wanted)]
    return requests + reset_requests(config, config.evaluation.resets_per_task)


def run_requests(
    pool: EnvPool, act: PoolAct, requests: list[EpisodeRequest], path: Path, name: str
) -> Iterator[EpisodeResult]:
    """Runs the episodes of a policy called `name` that the file `path` lacks, and yields them. It
    gets a line for each finished one, so that a killed evaluation continues."""
    records = read_metrics(path)
    finished = {start_of(r) for r in records}
    missing = [r for r in requests if (r.task_id, r.init_state_id, r.seed) not in finished]
    if not missing:
        return
    with continue_records(path, records) as file:
        results = pool.policy_episodes(missing, act, source=name)
        for result in progress(results, f"evaluation, {name}", len(missing)):
            record = {
                "task": result.request.task_id,
                "init_state": result.request.init_state_id,
                "seed": result.request.seed,
                "success": bool(result.episode.success),
                "first_success": result.first_success,
                "length": int(result.episode.length),
                "goal_fraction": float(result.episode.goal_fraction),
                "seconds": result.seconds,
            }
            file.write(json.dumps(record) + "\n")
            yield result


def _film(config: Config, pool: EnvPool, act: Act, params: Params, directory: Path) -> dict:
    """Repeats the improved policy's first success and first failure with the camera on, from fixed
    init states if there were any."""
    episodes = read_metrics(directory / "episodes_improved.jsonl")
    starts = sorted(((e["init_state"] < 0, *start_of(e)), e["success"]) for e in episodes)
    videos = {}
    for kind, wanted in (("success", True), ("failure", False)):
        chosen = [start for start, success in starts if success == wanted]
        if not chosen:
            continue
        _, task, init_state, seed = chosen[0]
        request = _request(
            config,
            task_id=task,
            init_state_id=init_state,
            seed=seed,
            video_size=config.evaluation.video_size,
        )
        acting = batched_act(config, act, params)
        (result,) = pool.policy_episodes([request], acting, source="improved")
        path = directory / f"{kind}.gif"
        write_video(result.video, path, config.robot.control_hz)
        videos[kind] = {
            "file": path.name,
            "task": task,
            "init_state": init_state,
            "repeated_outcome": bool(result.episode.success),
        }
    return videos
