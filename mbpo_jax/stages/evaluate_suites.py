"""One policy on suites of tasks, outside a run: every episode once, however often it is stopped."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mbpo_jax.envs import suites
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim import libero_suites
from mbpo_jax.envs.sim.recording import write_video
from mbpo_jax.envs.workers.pool import PoolAct
from mbpo_jax.files import write_json
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.evaluate import requests_of, run_requests
from mbpo_jax.stages.perturbed import comparisons, drop_of, label
from mbpo_jax.stages.simulation import make_pool
from mbpo_jax.stages.statistics import start_of, summarize
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.metrics import continue_records, read_metrics

# Steps of an episode in openpi's evaluation on LIBERO; perturbed suites have those of their own.
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
_OTHER_MAX_STEPS = 520
_VIDEO_SIZE = 256
# What an episode depends on: episodes that were run under other values are not continued.
SECTIONS = ("policy", "suite", "cameras", "image_size", "chunk", "max_steps", "until_end", "seed")

ActorOf = Callable[[str, Sequence[int]], PoolAct]  # (suite, its tasks) -> what acts on them


def evaluate_suites(
    root: Path,
    config: Config,
    wanted: Mapping[str, Sequence[int]],
    actor_of: ActorOf,
    against: str | None = None,
) -> dict:
    """Runs the episodes that are missing below `root`, where every suite has a folder with
    `episodes.jsonl` and videos, and writes `results.json` with all of them.

    Args:
        config: "policy" (its name), "cameras", "image_size", "chunk" (steps that are executed of
            each), "max_steps" (0 for what is usual), "until_end", "videos" (per task), "seed",
            "robot.control_hz", "workers", "worker_backend", and "evaluation" as `requests_of`.
        wanted: suite -> its tasks.

    Raises:
        StageError: a folder was made under other settings, or a task lacks init states.
        ValueError: a suite or task that does not exist or cannot be compared.
        WorkerError: as `EnvPool`.
    """
    wanted = {suite: list(tasks) for suite, tasks in wanted.items()}
    pairs = comparisons(wanted, against)
    if len({label(suite) for suite in wanted}) < len(wanted):
        raise ValueError(f"two suites have the same name: {', '.join(wanted)}")
    configs = {suite: _suite_config(config, suite, tasks) for suite, tasks in wanted.items()}
    requests = {suite: _requests(own) for suite, own in configs.items()}  # refused before any runs
    found: dict[str, dict] = {}
    for suite, own in configs.items():
        directory = Workspace(root, own).begin(label(suite), SECTIONS)
        episodes = _run_suite(own, requests[suite], directory, actor_of)
        found[suite] = _result(own, episodes)
        for perturbed, (base, originals) in pairs.items():
            if {perturbed, base} <= found.keys():
                found[perturbed]["drop"] = drop_of(found[perturbed], found[base], originals)
        results = _write(root, config, found)
    return results


def _suite_config(config: Config, suite: str, tasks: Sequence[int]) -> Config:
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.suite, own.tasks = suite, tuple(tasks)
        usual = MAX_STEPS.get(libero_suites.unperturbed(suite), _OTHER_MAX_STEPS)
        own.max_steps = config.max_steps or usual
    return own


def _requests(config: Config) -> list[EpisodeRequest]:
    """Those of `requests_of`, the first `config.videos` of every task filmed."""
    requests, filmed = [], dict.fromkeys(config.tasks, 0)
    for request in requests_of(config):
        film = filmed[request.task_id] < config.videos
        filmed[request.task_id] += 1
        requests.append(
            dataclasses.replace(
                request,
                until_end=config.until_end,
                video_size=_VIDEO_SIZE if film else 0,
            )
        )
    return requests


def _run_suite(
    config: Config, requests: list[EpisodeRequest], directory: Path, actor_of: ActorOf
) -> list[dict]:
    """The records of the requested episodes, in their order."""
    path = directory / "episodes.jsonl"
    starts = {(r.task_id, r.init_state_id, r.seed): r for r in requests}

    def unfilmed(record: dict) -> bool:
        request = starts.get(start_of(record))
        return bool(request and request.video_size and not _video(directory, request).exists())

    records = read_metrics(path)
    kept = [record for record in records if not unfilmed(record)]
    if len(kept) < len(records):  # run again, as they are, with the camera on
        continue_records(path, kept).close()
    if not starts.keys() <= {start_of(record) for record in kept}:
        with make_pool(config) as pool:
            act = actor_of(config.suite, config.tasks)
            for result in run_requests(pool, act, requests, path, label(config.suite)):
                if result.video is not None:
                    film = _video(directory, result.request)
                    write_video(result.video, film, config.robot.control_hz)
    by_start = {start_of(record): record for record in read_metrics(path)}
    return [by_start[start] for start in starts]


def _video(directory: Path, request: EpisodeRequest) -> Path:
    fixed = request.init_state_id >= 0
    start = f"init{request.init_state_id:03d}" if fixed else f"seed{request.seed:07d}"
    return directory / f"task{request.task_id:03d}_{start}.gif"


def _result(config: Config, episodes: list[dict]) -> dict:
    """`summarize`, with "reached" (episodes in which the task was done at any time), the tasks'
    names and the episodes."""
    summary = summarize(episodes, config.tasks)
    for task, part in [(None, summary), *((t, summary["tasks"][str(t)]) for t in config.tasks)]:
        own = [e for e in episodes if task in (None, e["task"])]
        part["reached"] = sum(e["first_success"] >= 0 for e in own)
        if task is not None:
            info = suites.task_info(config.suite, task)
            part |= {"name": info.name, "instruction": info.instruction}
    return {
        "suite": config.suite,
        "max_steps": config.max_steps,
        "summary": summary,
        "episodes": episodes,
    }


def _write(root: Path, config: Config, found: Mapping[str, dict]) -> dict:
    results = {
        **{
            name: config[name] for name in ("policy", "cameras", "image_size", "chunk", "until_end")
        },
        "suites": {label(suite): result for suite, result in found.items()},
    }
    write_json(Path(root) / "results.json", results)
    return results
