"""Several ways to optimise one fine-tuned policy, each a working directory beside the run whose
early stages they share: BASE/ and BASE_NAME/."""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_collections

SHARED_STAGES = ("demonstrations", "sft", "rollouts", "world_model", "value")


def require_simulator(config: ml_collections.ConfigDict) -> None:
    """Refuses, with ValueError, the config of a robot of which there are only recordings."""
    if "evaluation" not in config:
        raise ValueError("policies are compared in a simulator, which this config's robot lacks")


def optimize_each(
    base: Path, config: ml_collections.ConfigDict, variants: Mapping[str, ml_collections.ConfigDict]
) -> tuple[dict, dict[str, dict]]:
    """Runs what is missing of the shared stages with `config`, then of policy optimisation and
    evaluation with each variant. The improved policy acts as it is, without choosing among chunks.

    Returns:
        the world model's summary, and name -> the evaluation's.
    """
    from mbpo_jax import pipeline

    world_model = pipeline.run(config, base, SHARED_STAGES).summary("world_model")
    evaluations = {}
    for name, variant in variants.items():
        directory = base.with_name(f"{base.name}_{name}")
        directory.mkdir(exist_ok=True)
        for stage in SHARED_STAGES:
            if not (directory / stage).exists():
                (directory / stage).symlink_to((base / stage).absolute())
        _reuse_fine_tuned(base, directory)
        variant = ml_collections.ConfigDict(variant.to_dict())
        variant.evaluation.best_of = 1
        done = pipeline.run(variant.lock(), directory, ("improve", "evaluate"))
        evaluations[name] = done.summary("evaluate")
    return world_model, evaluations


def _reuse_fine_tuned(base: Path, directory: Path) -> None:
    """The fine-tuned policy's episodes are the same for every variant."""
    target = directory / "evaluate" / "episodes_sft.jsonl"
    for other in sorted(base.parent.glob(f"{base.name}_*/evaluate/done.json")):
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(other.with_name("episodes_sft.jsonl"), target)


@contextlib.contextmanager
def continued(root: Path) -> Iterator[None]:
    """What the user can mend is one message and exit status 1; after SIGTERM the command says that
    it continues in `root`."""
    from mbpo_jax.envs.workers.pool import WorkerError
    from mbpo_jax.stages.workspace import StageError
    from mbpo_jax.training.interruption import Interrupted, interruptible

    goes_on = f"the same command continues in {root}"
    try:
        with interruptible(f"stopped by SIGTERM; {goes_on}"):
            yield
    except Interrupted as stop:
        print(f"{stop.message}; {goes_on}", flush=True)
        raise
    except (StageError, WorkerError, ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
