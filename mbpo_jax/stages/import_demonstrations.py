"""The stage `demonstrations` out of anyone's dataset instead of the simulator."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mbpo_jax.data.episodes import write_episodes
from mbpo_jax.data.formats import summary
from mbpo_jax.data.formats.conversion import Facts
from mbpo_jax.data.pipelines import spread
from mbpo_jax.data.spool import EpisodeSpool
from mbpo_jax.episode import Episode
from mbpo_jax.stages.import_source import Import
from mbpo_jax.stages.read_source import (
    CONTACT_SHEET,
    SHEET_EPISODES,
    judge,
    plain,
    read_entries,
    wanted_tasks,
)
from mbpo_jax.stages.workspace import Workspace


def import_demonstrations(workspace: Workspace, directory: Path, job: Import) -> dict:
    """The work of the stage: the source's episodes on the config's tasks, of demonstrations the
    successes alone, become its dataset. It continues where an earlier call was stopped.

    Raises:
        StageError: episodes are bad and not skipped (the message has all their problems), or none
            is left.
    """
    config = workspace.config
    entries = job.entries(config)
    spool, log = EpisodeSpool(directory / "spool"), directory / "episodes.jsonl"
    found = _read_log(log)
    with log.open("a") as file:

        def store(number, facts, episode):
            if episode is not None:
                spool.add(_spool_name(number), episode)
            found[number] = facts
            file.write(json.dumps([number, dataclasses.asdict(facts)]) + "\n")
            file.flush()

        read_entries(entries, config, job, tuple(found), store)
    facts = [found[number] for number in range(len(entries))]
    print(judge(facts, config, job))
    kept = [number for number, f in enumerate(facts) if f.kept]
    shown = [kept[i] for i in spread(len(kept), SHEET_EPISODES)]
    summary.write_contact_sheet(
        directory / CONTACT_SHEET, {facts[i].name: spool.load(_spool_name(i)) for i in shown}
    )
    tasks = wanted_tasks(config)
    if tasks is None:
        names = dict.fromkeys(plain(facts[i].instruction) for i in kept)
        tasks = {name: number for number, name in enumerate(names)}
    if not (directory / "dataset").exists():
        write_episodes(directory / "dataset", _episodes(spool, kept, tasks))
    kept_facts = [facts[i] for i in kept]
    attempts = Counter(plain(f.instruction) for f in facts)
    successes = Counter(plain(f.instruction) for f in kept_facts)
    return {
        "format": job.format,
        "source": str(job.source),
        "episodes": len(kept),
        "attempts": len(facts),
        "successes": sum(f.success is not False for f in kept_facts),
        "skipped": {f.name: f.problems for f in facts if f.problems},
        "mean_length": float(np.mean([f.length for f in kept_facts])),
        "frames": sum(f.frames for f in kept_facts),
        "control_rate": kept_facts[0].control_rate,
        "tasks": {
            str(task): {"instruction": x, "successes": successes[x], "attempts": attempts[x]}
            for x, task in tasks.items()
        },
    }


def _episodes(
    spool: EpisodeSpool, numbers: Sequence[int], tasks: Mapping[str, int]
) -> Iterator[Episode]:
    for number in tqdm(numbers, desc="writing", unit="ep"):
        episode = spool.load(_spool_name(number))
        yield dataclasses.replace(episode, task_id=tasks[plain(episode.instruction)])


def _spool_name(number: int) -> str:
    return f"{number:06d}"


def _read_log(path: Path) -> dict[int, Facts]:
    """What an earlier call found, by number of the entry; a line cut off by a stop is removed."""
    if not path.exists():
        return {}
    lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
    path.write_text("".join(lines))
    return {number: Facts(**facts) for number, facts in map(json.loads, lines)}
