"""Stages `demonstrations` and `rollouts` of a robot without a simulator: recorded episodes."""

from pathlib import Path

from mbpo_jax.data.episodes import dataset_facts, read_episodes
from mbpo_jax.episode import Episode
from mbpo_jax.stages.build import observation_builder, robot
from mbpo_jax.stages.workspace import StageError, Workspace


def take_demonstrations(workspace: Workspace, directory: Path) -> dict:
    """Checks the teleoperated successes of `demonstrations.dataset` and links to them.

    Raises:
        StageError: none are named, or some are not this robot's or no successes; all are listed.
    """
    return _take(
        workspace,
        directory,
        "record demonstrations on the robot, import them, and name their episode dataset",
        successes_only=True,
    )


def take_rollouts(workspace: Workspace, directory: Path) -> dict:
    """Checks the fine-tuned policy's episodes of `rollouts.dataset`, successes and failures, and
    links to them. Raises as `take_demonstrations`."""
    sft = workspace.directory("sft") / "policy"
    return _take(
        workspace,
        directory,
        f"run the policy of {sft} on the robot, import its successes and failures, and name their "
        "episode dataset",
        successes_only=False,
    )


def _take(workspace: Workspace, directory: Path, advice: str, successes_only: bool) -> dict:
    stage = directory.name
    source = workspace.config[stage].dataset
    try:
        if not source:
            raise StageError(f"there are no {stage}: {advice} with --config.{stage}.dataset=DIR")
        episodes = read_episodes(source)
        _check(workspace, source, episodes, successes_only)
    except (StageError, ValueError):
        workspace.abandon(stage)
        raise
    link = directory / "dataset"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(source).absolute(), target_is_directory=True)
    tasks = sorted({(e.task_id, e.instruction) for e in episodes})
    return dataset_facts(episodes) | {
        "source": str(source),
        "format": "episodes",
        "attempts": len(episodes),
        "successes": sum(e.success for e in episodes),
        "tasks": {str(task): {"instruction": instruction} for task, instruction in tasks},
    }


def _check(
    workspace: Workspace, source: str, episodes: list[Episode], successes_only: bool
) -> None:
    config = workspace.config
    embodiment = robot(config)
    prompt_problems = observation_builder(config).prompt_problems
    lines = []
    for i, episode in enumerate(episodes):
        problems = embodiment.problems(episode, config.cameras, config.image_size, config.chunk)
        problems += prompt_problems(episode.instruction)
        if successes_only and not episode.success:
            problems.append("a failure, which supervised fine-tuning would imitate")
        lines += [f"  episode {i}: {problem}" for problem in problems]
    if lines:
        raise StageError(
            f"{source} does not hold episodes of the robot {embodiment.name!r}:\n"
            + "\n".join(lines)
            + "\nImport them again, or change the config's robot"
        )
