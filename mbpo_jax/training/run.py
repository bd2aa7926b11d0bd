"""What every training has beside its algorithm: a place on disk and on devices, and a name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mbpo_jax.training.sharding import Rules, make_mesh


@dataclass(frozen=True)
class Run:
    """Where and as what a training runs.

    name: what the progress bar says.
    directory: receives `checkpoints/` and the metrics.
    seed: of the step's random keys; part of the checkpoints' origin.
    mesh, rules: the devices, and how parameters are split over them (`parameter_sharding`).
    origin, keep: of the checkpoints, see `Checkpoints`; the seed is added to the origin.
    loggers: of the metrics, beside their file (`training.metrics.LOGGERS`).
    profile_steps: see `StepProfiler`.
    """

    name: str
    directory: Path
    seed: int
    mesh: Mesh = field(default_factory=make_mesh)
    rules: Rules = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 1
    loggers: Sequence[str] = ("tensorboard",)
    profile_steps: Sequence[int] = ()

    @classmethod
    def of(
        cls, config: Any, name: str, directory: Path, seed: int, origin: Mapping[str, Any]
    ) -> "Run":
        """The run that the common entries of a config describe."""
        return cls(
            name=name,
            directory=Path(directory),
            seed=seed,
            mesh=make_mesh(config.parallel.fsdp),
            rules=config.parallel.rules,
            origin=origin,
            keep=config.checkpoints.keep,
            loggers=config.loggers,
            profile_steps=config.profile_steps,
        )
