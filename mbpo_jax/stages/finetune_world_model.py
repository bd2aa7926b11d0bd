"""Stage `world_model`: autoencoder, dynamics and reward; its fidelity is then measured."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.pipelines import Source, collate_some, process_rows, split_episodes, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.nn.normalization import BOUND
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    Config,
    build_world_model,
    check_prompts,
    checkpoint_origin,
    dataclass_from,
    observation_builder,
    robot,
)
from mbpo_jax.stages.measure_fidelity import measure_fidelity
from mbpo_jax.stages.train_dynamics import train_dynamics
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import save_params
from mbpo_jax.training.loop import Training, fit
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import make_mesh, parameter_sharding
from mbpo_jax.types import Params, Transition
from mbpo_jax.world_model import bagel
from mbpo_jax.world_model.checkpoint import load_bagel
from mbpo_jax.world_model.statistics import neutral_statistics, widen_proprio
from mbpo_jax.world_model.umm_world import UMMWorld

STATISTICS_TRANSITIONS = 512


def world_model_episodes(
    workspace: Workspace, stages: Sequence[str] = ("demonstrations", "rollouts")
) -> tuple[list[Episode], list[Episode]]:
    """(training, held-out) episodes: demonstrations and rollouts, or one of the two, split by
    episode."""
    config = workspace.config
    workspace.require("demonstrations")
    workspace.require("rollouts")
    train, held_out = [], []
    for stage in stages:
        episodes = read_episodes(workspace.directory(stage) / "dataset")
        # Not a stream: what an earlier run held out must stay held out.
        kept, held = split_episodes(episodes, config.world_model.holdout_fraction, config.seed)
        train += kept
        held_out += held
    return train, held_out


def finetune_world_model(workspace: Workspace, directory: Path) -> dict:
    """Trains UMM-World; writes `world_model/`, `fidelity.npz` (film strips) and their numbers."""
    config = workspace.config
    train, held_out = world_model_episodes(workspace)
    check_prompts(workspace, directory.name, [*train, *held_out])
    world = build_world_model(config)
    params = _initial_params(config, world)
    builder = observation_builder(config)
    sources = transitions(train, builder, config.chunk)
    if len(sources) < config.world_model.dynamics_batch_size:
        raise StageError(
            f"only {len(sources)} transitions of {config.chunk} steps in the training episodes; "
            "collect more (--config.rollouts.episodes_per_task)"
        )
    some = collate_some(sources, STATISTICS_TRANSITIONS)
    if config.world_model.vae_training.steps:
        params = _train_vae(config, world, params, train, directory / "vae")
    params["statistics"] = measured_statistics(config, world, params, some, train, sources)
    params = train_dynamics(config, world, params, sources, train, directory / "dynamics")
    save_params(directory / "world_model", params)
    report = measure_fidelity(config, world, params, train, held_out, directory)
    return {
        "training_episodes": len(train),
        "held_out_episodes": len(held_out),
        "transitions": len(sources),
        "transitions_skipped": sources.skipped,
        "actions_clipped": count_clipped(train, robot(config).action_limits),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **report,
    }


def measured_statistics(
    config: Config,
    world: UMMWorld,
    params: Params,
    some: Transition,
    episodes: list[Episode],
    sources: Source,
) -> Params:
    """The statistics measured on some transitions, with room for all the others' proprioception;
    where that has to be made, says so on the terminal."""
    statistics = params["statistics"] | world.measured(some)
    episode, now, later = sources.index.T
    values = [
        np.stack([episodes[e].proprio[f] for e, f in zip(episode, frames)])
        for frames in (now, later)
    ]
    statistics, wide = widen_proprio(statistics, *values)
    if wide:
        names = ", ".join(robot(config).states[i] for i in wide)
        print(
            f"[world_model] statistics of proprioception widened to keep values within ±{BOUND:g}: "
            f"{names}"
        )
    return statistics


def count_clipped(episodes: list[Episode], limits: Sequence[tuple[float, float]]) -> int:
    """How many action values lie outside the robot's limits (low, high), to which the world model
    clips them; says so on the terminal."""
    low, high = np.asarray(limits).T
    clipped = sum(int(((e.actions < low) | (e.actions > high)).sum()) for e in episodes)
    if clipped:
        total = sum(e.actions.size for e in episodes)
        print(f"[world_model] {clipped} of {total} action values beyond their limits are clipped")
    return clipped


def _initial_params(config: Config, world: UMMWorld) -> Params:
    """BAGEL's checkpoint where the config names one, else fresh parameters."""
    key = jax.random.key(stream(config.seed, "world_model_init"))
    if not config.pretrained.world_model:
        return world.init(key)
    mesh, rules = make_mesh(config.parallel.fsdp), config.parallel.rules
    sizes, params = load_bagel(
        config.pretrained.world_model,
        world.config,
        lambda tree: parameter_sharding(tree, mesh, rules),
    )
    if sizes != world.config:
        raise StageError(
            f"{config.pretrained.world_model} holds a model of other sizes than "
            f"world_model.model: {sizes} there, {world.config} in the config"
        )
    # What a released model does not have starts fresh.
    fresh = bagel.init_adapters(world.config, world.action_dim, key)
    return {
        **params,
        "adapters": {**fresh, **params["adapters"]},
        "statistics": neutral_statistics(world.config, world.cameras, world.action_dim),
    }


def _train_vae(
    config: Config, world: UMMWorld, params: Params, episodes: list[Episode], directory: Path
) -> Params:
    frames = np.concatenate([e.images[c] for e in episodes for c in config.cameras])
    section = config.world_model.vae_training
    batch_size, seed = section.batch_size, stream(config.seed, "autoencoder_batches")

    def image_batches(first: int) -> Iterator[np.ndarray]:
        step = first
        while True:
            rng = np.random.default_rng((seed, step))
            yield frames[rng.integers(len(frames), size=batch_size)[process_rows(batch_size)]]
            step += 1

    vae = fit(
        lambda vae, frozen, images, key: world.autoencoder.loss(vae, images, key),
        params["vae"],
        {},
        image_batches,
        dataclass_from(Training, section),
        Run.of(
            config,
            "image autoencoder",
            directory,
            stream(config.seed, "autoencoder"),
            checkpoint_origin(config, ["world_model"], {}),
        ),
    )
    return {**params, "vae": vae}
