"""The runs of a comparison, each a working directory below one folder:

seed0/              the stages that all methods share
seed0_METHOD/       links to them, what the method trained (`improve`, or a link), its evaluation
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import ml_collections

from experiments.compare.methods import METHODS, Method, check_budgets
from experiments.shared_stages import require_simulator
from mbpo_jax import pipeline
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.evaluate import requests_of, run_actors
from mbpo_jax.stages.simulation import make_pool
from mbpo_jax.stages.workspace import Workspace


def merged(config: Config, settings: Config) -> Config:
    """The config of a comparison: a run's with the section `compare`, and with random resets in its
    evaluation, by default as many as the stage `selection` has.

    Raises:
        ValueError: a config without a simulator, or a setting out of range.
    """
    require_simulator(config)
    if settings.best_of.chunks_to_choose_from < 2:
        raise ValueError("compare.best_of.chunks_to_choose_from: choose among 2 chunks or more")
    if not 0 < settings.recap.positive_share < 1:
        raise ValueError("compare.recap.positive_share is a share between 0 and 1")
    if not 0 < settings.reinbot.expectile < 1:
        raise ValueError("compare.reinbot.expectile lies between 0 and 1")
    if min(settings.online.refills, settings.online.large_factor) < 1:
        raise ValueError("compare.online: refills and large_factor are 1 or more")
    whole = ml_collections.ConfigDict({**config.to_dict(), "compare": settings.to_dict()})
    if not whole.evaluation.resets_per_task:
        whole.evaluation.resets_per_task = whole.selection.resets_per_task
    return whole.lock()


def run(
    config: Config,
    root: Path,
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """All that is not finished: for each seed the shared stages, then each method's training and
    evaluation; `after_each` seed.

    Raises:
        StageError: as `pipeline.run`, e.g. a folder made by another config.
        ValueError: budgets that differ.
    """
    check_budgets(config, methods)
    needed = max((m.shared for m in methods.values()), key=len)
    root.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        seeded = ml_collections.ConfigDict(config.to_dict() | {"seed": seed}).lock()
        pipeline.run(seeded, root / f"seed{seed}", needed)
        for name, method in methods.items():
            run_method(seeded, root, name, method)
        after_each()


def run_method(config: Config, root: Path, name: str, method: Method) -> Workspace:
    """Trains and evaluates one method of one seed, where that is not finished."""
    print(f"== seed{config.seed}_{name}", flush=True)
    workspace = train(config, root, name, method)
    with jax.default_matmul_precision(config.get("matmul_precision") or None):
        evaluation = partial(evaluate, name)
        pipeline.run_stage(workspace, "evaluate", evaluation, method.settings)
    return workspace


def train(config: Config, root: Path, name: str, method: Method) -> Workspace:
    """The method's working directory with what it, or the method that trains for it, learned."""
    base = f"seed{config.seed}"
    workspace = Workspace(root / f"{base}_{name}", method.config(config))
    if method.trained_by:
        train(config, root, method.trained_by, METHODS[method.trained_by])
        _link(workspace.directory("improve"), f"{base}_{method.trained_by}")
    for stage in method.shared:
        _link(workspace.directory(stage), base)
    if method.train:
        with jax.default_matmul_precision(config.get("matmul_precision") or None):
            pipeline.run_stage(workspace, "improve", method.train, method.settings)
    return workspace


def _link(directory: Path, run: str) -> None:
    """Makes a stage's directory that of the run beside its own."""
    if not directory.is_symlink():
        directory.symlink_to(Path("..") / run / directory.name, target_is_directory=True)


def evaluate(name: str, workspace: Workspace, directory: Path) -> dict:
    """The method in the simulator, from the starts that all methods have."""
    config = workspace.config
    acting = METHODS[name].actor(workspace)
    with make_pool(config) as pool:
        return run_actors(config, pool, {name: acting}, requests_of(config), directory)
