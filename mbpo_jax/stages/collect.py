"""Stages `demonstrations` and `rollouts`: episodes from the simulator into a dataset."""

import itertools
from pathlib import Path

from tqdm import tqdm

from mbpo_jax import seeds
from mbpo_jax.data.episodes import dataset_facts, write_episodes
from mbpo_jax.data.spool import EpisodeSpool
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.workers.pool import EnvPool
from mbpo_jax.episode import Episode
from mbpo_jax.stages.acting import exploring
from mbpo_jax.stages.build import Config, load_policy
from mbpo_jax.stages.simulation import batched_act, make_pool, progress
from mbpo_jax.stages.statistics import wilson_interval
from mbpo_jax.stages.workspace import StageError, Workspace

MAX_ATTEMPTS = 8  # for each demonstration


def collect_demonstrations(workspace: Workspace, directory: Path) -> dict:
    """Scripted successes from random resets, `demonstrations.episodes_per_task` of each task.

    Raises:
        StageError: the expert fails too often: those successes take more than MAX_ATTEMPTS attempts
            at each, or would by the 95 % Wilson interval of its success so far.
    """
    config = workspace.config
    spool = EpisodeSpool(directory / "spool")
    with make_pool(config) as pool:
        for task in config.tasks:
            _demonstrate_task(config, pool, spool, task)
        restarts = pool.restarts
    episodes, attempts, per_task = [], 0, {}
    for task in config.tasks:
        tried, kept = _first_successes(config, spool, task)
        episodes += kept
        attempts += tried
        per_task[str(task)] = {
            "instruction": kept[0].instruction,
            "successes": len(kept),
            "attempts": tried,
        }
    _write_dataset(directory, episodes)
    return dataset_facts(episodes) | {
        "attempts": attempts,
        "expert_success_rate": len(episodes) / attempts,
        "worker_restarts": restarts,
        "tasks": per_task,
    }


def _demonstrate_task(config: Config, pool: EnvPool, spool: EpisodeSpool, task: int) -> None:
    wanted = config.demonstrations.episodes_per_task
    with tqdm(total=wanted, desc=f"demonstrations, task {task}", unit="ep") as bar:
        while True:
            tried, kept = _first_successes(config, spool, task)
            bar.update(len(kept) - bar.n)
            if len(kept) == wanted:
                return
            hopeless = tried and MAX_ATTEMPTS * wilson_interval(len(kept), tried)[1] < 1
            if hopeless or tried >= MAX_ATTEMPTS * wanted:
                raise StageError(_too_few(config, task, len(kept), tried))
            requests = [_demonstration(config, task, tried + i) for i in range(wanted - len(kept))]
            for result in pool.expert_episodes(_missing(spool, requests)):
                spool.add(_name(result.request), result.episode)
                bar.update(int(result.episode.success))


def _too_few(config: Config, task: int, successes: int, tried: int) -> str:
    section = config.demonstrations
    misses = ""
    if section.aim_error or any(section.aim_offset):
        misses = (
            f"let it miss its places by less (--config.demonstrations.aim_error is "
            f"{section.aim_error}, aim_offset {tuple(section.aim_offset)}, metres), "
        )
    return (
        f"the scripted expert succeeded in only {successes} of {tried} episodes of task {task} of "
        f"{config.suite}; {misses}choose other tasks (--config.tasks) or import demonstrations"
    )


def _demonstration(config: Config, task: int, number: int) -> EpisodeRequest:
    return EpisodeRequest(
        task_id=task,
        seed=seeds.reset(config.seed, "demonstrations", number),
        max_steps=config.max_steps,
        action_noise=tuple(config.demonstrations.action_noise),
        aim_error=config.demonstrations.aim_error,
        aim_offset=tuple(config.demonstrations.aim_offset),
        render_every=config.demonstrations.render_every,
    )


def _first_successes(config: Config, spool: EpisodeSpool, task: int) -> tuple[int, list[Episode]]:
    """Episodes tried until enough successes were reached, and those, in the order of seeds.

    Episodes finish in any order; those behind a seed that has not finished do not count yet, so
    that a stopped collection goes on to the same episodes.
    """
    kept: list[Episode] = []
    finished = set(spool.names())
    for number in itertools.count():
        name = _name(_demonstration(config, task, number))
        if name not in finished or len(kept) == config.demonstrations.episodes_per_task:
            return number, kept
        episode = spool.load(name)
        if episode.success:
            kept.append(episode)


def collect_rollouts(workspace: Workspace, directory: Path) -> dict:
    """Episodes of the fine-tuned policy from random resets, successes and failures."""
    config = workspace.config
    workspace.require("sft")
    sft = workspace.directory("sft")
    policy, params = load_policy(config, sft, sft / "policy")
    spool = EpisodeSpool(directory / "spool")
    requests = [
        EpisodeRequest(
            task_id=task,
            seed=seeds.reset(config.seed, "rollouts", i),
            max_steps=config.max_steps,
            render_every=config.rollouts.render_every,
        )
        for task in config.tasks
        for i in range(config.rollouts.episodes_per_task)
    ]
    with make_pool(config) as pool:
        act = batched_act(config, exploring(policy, config.rollouts.noise_std), params)
        missing = _missing(spool, requests)
        results = pool.policy_episodes(missing, act, source="sft")
        for result in progress(results, "rollouts", len(missing)):
            spool.add(_name(result.request), result.episode)
        restarts = pool.restarts
    episodes = [spool.load(_name(r)) for r in requests]
    _write_dataset(directory, episodes)
    return dataset_facts(episodes) | {
        "successes": sum(e.success for e in episodes),
        "worker_restarts": restarts,
    }


def _name(request: EpisodeRequest) -> str:
    return f"task{request.task_id:03d}_seed{request.seed:09d}"


def _missing(spool: EpisodeSpool, requests: list[EpisodeRequest]) -> list[EpisodeRequest]:
    finished = set(spool.names())
    return [request for request in requests if _name(request) not in finished]


def _write_dataset(directory: Path, episodes: list[Episode]) -> None:
    if not (directory / "dataset").exists():
        write_episodes(directory / "dataset", episodes)
