"""Stage `fidelity`: what the world model gets right on held-out episodes, beside copying the last
frame and beside models that lack one of its parts (arXiv 2603.20607, table 1 and appendix E.2)."""

import copy
from collections.abc import Callable
from pathlib import Path

import jax

from mbpo_jax.data.pipelines import collate_some, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    Config,
    build_world_model,
    load_world_model,
    observation_builder,
)
from mbpo_jax.stages.contenders import Contender, Strips, Study
from mbpo_jax.stages.finetune_world_model import measured_statistics, world_model_episodes
from mbpo_jax.stages.measure_fidelity import FIDELITY_TRANSITIONS
from mbpo_jax.stages.train_dynamics import train_dynamics
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.types import Params
from mbpo_jax.world_model.frame_by_frame import FrameByFrame
from mbpo_jax.world_model.umm_world import UMMWorld


def study_fidelity(workspace: Workspace, directory: Path) -> tuple[dict, Strips, dict[str, Strips]]:
    """Measures the trained world model and trains and measures `config.fidelity.ablations`.

    Returns:
        the numbers, the film strips of the episodes, and those of every model.

    Raises:
        StageError: an ablation that is unknown or cannot be made of this config.
    """
    config = workspace.config
    workspace.require("world_model")
    unknown = [name for name in config.fidelity.ablations if name not in ABLATIONS]
    if unknown:
        raise StageError(f"fidelity.ablations: {unknown} not among {sorted(ABLATIONS)}")
    train, held_out = world_model_episodes(workspace)
    world, params = load_world_model(config, workspace.root)
    study = Study(config, world, params, train, held_out)
    contenders = {"UMM-World": Contender(world, params, params)}
    for name in config.fidelity.ablations:
        contenders[name.replace("_", " ")] = ABLATIONS[name](study, directory / name)
    results, strips = {}, {}
    for name, contender in contenders.items():
        print(f"[fidelity] measuring {name}", flush=True)
        results[name], strips[name] = study.measure(contender)
    return {"models": results, "real": study.real_numbers()}, study.real_strips(), strips


# Ablations: each trains a model that lacks one part, from fresh parameters around the same
# autoencoder, with the same steps and batches.


def _trained(study: Study, config: Config, world: UMMWorld, directory: Path) -> Params:
    params = _fresh(config, world, study.params)
    sources = transitions(study.train, study.builder, world.chunk)
    if world.chunk != study.world.chunk:
        some = collate_some(sources, FIDELITY_TRANSITIONS)
        params["statistics"] = measured_statistics(
            config, world, params, some, study.train, sources
        )
    return train_dynamics(config, world, params, sources, study.train, directory)


def _fresh(config: Config, world: UMMWorld, trained: Params) -> Params:
    params = world.init(jax.random.key(stream(config.seed, "world_model_init")))
    return params | {k: trained[k] for k in ("vae", "statistics") if k in trained}


def separate_reward_params(
    config: Config, world: UMMWorld, trained: Params, train: list[Episode], directory: Path
) -> Params:
    """A model that learns the reward alone, around the autoencoder and the statistics of a
    `trained` one."""
    config = _changed(config, lambda c: c.world_model.update(dynamics_weight=0.0))
    sources = transitions(train, observation_builder(config), config.chunk)
    params = _fresh(config, world, trained)
    return train_dynamics(config, world, params, sources, train, directory)


def _changed(config: Config, change: Callable[[Config], None]) -> Config:
    changed = copy.deepcopy(config)
    with changed.unlocked():
        change(changed)
    return changed


def _independent_views(study: Study, directory: Path) -> Contender:
    """Every view from all current views and the actions, none from another generated view."""
    config = _changed(study.config, lambda c: c.world_model.model.update(interleaved=False))
    world = build_world_model(config)
    params = _trained(study, config, world, directory)
    return Contender(world, params, params)


def _frame_by_frame(study: Study, directory: Path) -> Contender:
    """Every rendered frame of the demonstrations, one after the other, instead of a chunk ahead."""
    chunk = study.config.demonstrations.render_every
    if chunk == study.config.chunk:
        raise StageError(
            "fidelity.ablations: frame_by_frame needs frames inside a chunk; set "
            "--config.demonstrations.render_every below --config.chunk"
        )
    config = _changed(study.config, lambda c: c.update(chunk=chunk))
    world = build_world_model(config)
    params = _trained(study, config, world, directory)
    return Contender(FrameByFrame(world, study.config.chunk // chunk), params, params)


def _separate_reward(study: Study, directory: Path) -> Contender:
    """Dynamics and reward each by a model of its own."""
    dynamics = _changed(study.config, lambda c: c.world_model.update(reward_weight=0.0))
    return Contender(
        study.world,
        _trained(study, dynamics, study.world, directory / "dynamics"),
        separate_reward_params(
            study.config, study.world, study.params, study.train, directory / "reward"
        ),
    )


def _without_pretraining(study: Study, directory: Path) -> Contender:
    """The same training from random parameters instead of a checkpoint's."""
    if not study.config.pretrained.world_model:
        raise StageError(
            "fidelity.ablations: without_pretraining only differs where "
            "--config.pretrained.world_model names a checkpoint"
        )
    params = _trained(study, study.config, study.world, directory)
    return Contender(study.world, params, params)


def _actions_as(kind: str) -> Callable[[Study, Path], Contender]:
    """Actions written as text, or as one embedded token per step."""

    def ablation(study: Study, directory: Path) -> Contender:
        if study.config.world_model.model.actions_as == kind:
            raise StageError(f"fidelity.ablations: the world model's actions are {kind} already")
        config = _changed(study.config, lambda c: c.world_model.model.update(actions_as=kind))
        world = build_world_model(config)
        params = _trained(study, config, world, directory)
        return Contender(world, params, params)

    return ablation


ABLATIONS: dict[str, Callable[[Study, Path], Contender]] = {
    "independent_views": _independent_views,
    "frame_by_frame": _frame_by_frame,
    "separate_reward": _separate_reward,
    "actions_as_text": _actions_as("text"),
    "actions_as_embedding": _actions_as("embedding"),
    "without_pretraining": _without_pretraining,
}
