"""Which tasks a perturbed suite is compared with, and what the perturbation costs."""

from collections.abc import Sequence
from pathlib import Path

from mbpo_jax.envs import suites
from mbpo_jax.envs.sim import libero_suites
from mbpo_jax.stages.statistics import newcombe_interval


def label(suite: str) -> str:
    """The name of a suite, that of its folder where it is given by files."""
    return Path(suite).name


def counterpart(suite: str, task: int, against: str) -> int | None:
    """The task of the suite `against` that a task is a perturbation of: the one of the same name,
    else of the name that its own begins with, or of the same instruction; None if there is none."""
    info = suites.task_info(suite, task)
    originals = [suites.task_info(against, i) for i in range(suites.num_tasks(against))]
    rules = (
        lambda own: own.name == info.name,
        lambda own: info.name.startswith(f"{own.name}_"),
        lambda own: own.instruction.lower() == info.instruction.lower(),
    )
    return next((i for rule in rules for i, own in enumerate(originals) if rule(own)), None)


def comparisons(
    wanted: dict[str, list[int]], against: str | None
) -> dict[str, tuple[str, list[int]]]:
    """Suite -> the suite that it is compared with and the tasks there. Adds those of `against` to
    `wanted`; without it a suite is compared with its own unperturbed one if that is wanted too."""
    pairs = {}
    for suite, tasks in [*wanted.items()]:
        base = against or libero_suites.unperturbed(suite)
        if base == suite or not (against or base in wanted):
            continue
        originals = {task: counterpart(suite, task, base) for task in tasks}
        if against:
            if None in originals.values():
                task = next(t for t, original in originals.items() if original is None)
                raise ValueError(
                    f"task {task} of {label(suite)} ({suites.task_info(suite, task).name}) is no "
                    f"perturbation of a task of {against}: compare it with another suite"
                )
            wanted[base] = sorted({*wanted.get(base, ()), *originals.values()})
        if {*originals.values()} <= {*wanted[base]}:
            pairs[suite] = base, sorted({*originals.values()})
    return pairs


def drop_of(perturbed: dict, base: dict, originals: Sequence[int]) -> dict:
    """How much lower success is than on the tasks `originals` of `base`, with the 95 % interval."""
    before = [e["success"] for e in base["episodes"] if e["task"] in originals]
    after = perturbed["summary"]
    counts = (sum(before), len(before)), (after["successes"], after["episodes"])
    rates = [successes / trials for successes, trials in counts]
    return {
        "against": label(base["suite"]),
        "episodes": len(before),
        "success_rate": rates[0],
        "drop": rates[0] - rates[1],
        "interval": list(newcombe_interval(*counts)),
    }
