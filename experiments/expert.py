"""Measures the scripted expert from random resets: success, length and time of every task.

    python -m experiments.expert --suite=libero_10
    python -m experiments.expert --suite=libero_goal,libero_10 --tasks=0,3 --episodes=20 --out=DIR
    python -m experiments.expert --suite=libero_90 --episodes=5 --out=DIR --gifs

Success has a 95 % interval (Wilson's); steps and seconds are an episode's means, without rendering.
A task that the expert cannot do is a line with the reason. With --out every episode is in
DIR/expert.json, a stopped measurement is continued by the same command, and more --episodes are
added to those that there are. --gifs films the first success and the first failure of each task.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.arguments import number, numbers
from mbpo_jax.files import write_json

CONTROL_HZ = 20.0  # every suite's
VIDEO_SIZE = 256


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # After the flags, so that --help is instant.
    from mbpo_jax.envs.workers.pool import WorkerError

    try:
        print(_measure(options))
    except (WorkerError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if options.out:
            print(f"the same command continues in {options.out}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", required=True, help="suites, comma-separated")
    add("--tasks", type=numbers(0), help="comma-separated; by default all of each suite")
    add("--episodes", type=number(int, 1), default=50, help="per task (default 50)")
    add("--max_steps", type=number(int, 1), default=520, help="of an episode (default 520)")
    add(
        "--jitter",
        type=number(float, 0),
        default=0.0,
        help="level of the smooth noise on the actions, as demonstrations have it (default 0)",
    )
    add(
        "--aim_error",
        type=number(float, 0),
        default=0.0,
        help="metres by which grasps and placings are off, one standard deviation (default 0)",
    )
    add("--out", type=Path, metavar="DIR", help="keep results in DIR/expert.json, continue them")
    add("--gifs", action="store_true", help="films in --out of a success and a failure per task")
    add("--workers", type=number(int, 1), default=2, help="simulators, 2.5 GB each (default 2)")
    return parser


def _measure(options: argparse.Namespace) -> str:
    from mbpo_jax.envs import suites

    if options.gifs and not options.out:
        raise ValueError("--gifs needs --out, the folder that they are written to")
    names = [name.strip() for name in options.suite.split(",") if name.strip()]
    wanted = {suite: options.tasks or [*range(suites.num_tasks(suite))] for suite in names}
    reasons = {
        (suite, task): suites.unsupported_by_expert(suite, task)
        for suite, tasks in wanted.items()
        for task in tasks
    }
    settings = ("max_steps", "jitter", "aim_error")
    records = Records(options.out, {name: getattr(options, name) for name in settings})
    for suite, tasks in wanted.items():
        able = [task for task in tasks if not reasons[suite, task]]
        _run(options, suite, able, records)
        if options.gifs:
            _film(options, suite, able, records)
    summary = [
        summarize(suite, task, suites.task_info(suite, task).instruction, reason, records.episodes)
        for (suite, task), reason in reasons.items()
    ]
    records.write(summary)
    return table(summary)


class Records:
    """The finished episodes, in the file `expert.json` of a folder if there is one.

    Raises:
        ValueError: the folder's episodes were run with other settings.
    """

    def __init__(self, folder: Path | None, settings: dict):
        self.path, self.settings = folder and folder / "expert.json", settings
        self.episodes: list[dict] = []
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        if self.path and self.path.exists():
            before = json.loads(self.path.read_text())
            if before["settings"] != settings:
                raise ValueError(
                    f"{self.path} has episodes with {before['settings']}, not {settings}: choose "
                    "another --out, or the same options"
                )
            self.episodes = before["episodes"]

    def add(self, episode: dict) -> None:
        self.episodes.append(episode)
        self.write([])

    def write(self, summary: list[dict]) -> None:
        """Replaces the file; a kill leaves the old one or the new one."""
        if self.path:
            content = {"settings": self.settings, "tasks": summary, "episodes": self.episodes}
            write_json(self.path, content)


def _run(options: argparse.Namespace, suite: str, tasks: list[int], records: Records) -> None:
    """Runs the missing episodes, without cameras: rendering costs ten times a step."""
    from mbpo_jax.envs.workers.pool import EnvPool

    finished = {(e["suite"], e["task"], e["seed"]) for e in records.episodes}
    request = _requester(options)
    missing = [
        request(task, seed)
        for task in tasks
        for seed in range(options.episodes)
        if (suite, task, seed) not in finished
    ]
    if not missing:
        return
    successes = 0
    with (
        EnvPool(suite, options.workers, cameras=()) as pool,
        tqdm(total=len(missing), desc=suite, unit="ep") as bar,
    ):
        for result in pool.expert_episodes(missing):
            episode = result.episode
            records.add(
                {
                    "suite": suite,
                    "task": result.request.task_id,
                    "seed": result.request.seed,
                    "success": bool(episode.success),
                    "length": int(episode.length),
                    "seconds": round(result.seconds, 2),
                }
            )
            successes += episode.success
            bar.update()
            bar.set_postfix(success=f"{successes}/{bar.n}")


def _film(options: argparse.Namespace, suite: str, tasks: list[int], records: Records) -> None:
    """Repeats the first success and the first failure of each task with the cameras on."""
    from mbpo_jax.envs import suites
    from mbpo_jax.envs.sim.recording import write_video
    from mbpo_jax.envs.workers.pool import EnvPool

    request = _requester(options, VIDEO_SIZE)
    paths = {}
    episodes = sorted(records.episodes, key=lambda e: e["seed"])
    for kind, success in (("success", True), ("failure", False)):
        for episode in reversed(episodes):
            if (episode["suite"], episode["success"]) == (suite, success):
                name = f"{Path(suite).name}_task{episode['task']:03d}_{kind}.gif"
                paths[episode["task"], success] = episode["seed"], options.out / name
    requests = {
        request(task, seed): path
        for (task, _), (seed, path) in paths.items()
        if task in tasks and not path.exists()
    }
    if requests:
        with EnvPool(suite, options.workers, cameras=suites.cameras(suite)) as pool:
            results = pool.expert_episodes(requests)
            for result in tqdm(results, total=len(requests), desc=f"{suite}, films", unit="ep"):
                write_video(result.video, requests[result.request], CONTROL_HZ)


def _requester(options: argparse.Namespace, video_size: int = 0) -> Callable:
    from mbpo_jax.envs.requests import EpisodeRequest

    def request(task: int, seed: int) -> EpisodeRequest:
        return EpisodeRequest(
            task,
            seed=seed,
            max_steps=options.max_steps,
            action_noise=(options.jitter,),
            aim_error=options.aim_error,
            render_every=10,
            video_size=video_size,
        )

    return request


def summarize(suite: str, task: int, instruction: str, reason: str, episodes: list[dict]) -> dict:
    """A task's successes with their interval, and its episodes' mean length and seconds; instead
    the `reason` why the expert cannot do it."""
    from mbpo_jax.stages.statistics import success_rate

    row = {"suite": suite, "task": task, "instruction": instruction}
    own = [e for e in episodes if (e["suite"], e["task"]) == (suite, task)]
    if reason or not own:
        return row | {"unsupported": reason}
    return (
        row
        | success_rate(sum(e["success"] for e in own), len(own))
        | {
            "mean_length": float(np.mean([e["length"] for e in own])),
            "seconds_per_episode": float(np.mean([e["seconds"] for e in own])),
        }
    )


def table(summary: list[dict]) -> str:
    rows = [("suite", "task", "success", "95 %", "steps", "seconds", "instruction")]
    for part in summary:
        start = Path(part["suite"]).name, str(part["task"])
        if "unsupported" in part:
            rows.append((*start, "", "", "", "", f"{part['instruction']} ({part['unsupported']})"))
            continue
        rows.append(
            (
                *start,
                f"{part['successes']}/{part['episodes']}",
                "–".join(f"{100 * x:.0f}" for x in part["interval"]),
                f"{part['mean_length']:.0f}",
                f"{part['seconds_per_episode']:.1f}",
                part["instruction"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths[:-1]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
