"""Joint training of UMM-World's dynamics and reward, on transitions and labelled frames."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mbpo_jax.data.pipelines import Source, batches, by_label, equal_parts, reward_examples
from mbpo_jax.episode import Episode
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import Config, checkpoint_origin, dataclass_from, observation_builder
from mbpo_jax.training.loop import LossFn, Training, fit
from mbpo_jax.training.run import Run
from mbpo_jax.types import Params
from mbpo_jax.world_model.umm_world import UMMWorld

ENCODED_FRAMES = 64  # at a time


def train_dynamics(
    config: Config,
    world: UMMWorld,
    params: Params,
    sources: Source,
    episodes: list[Episode],
    directory: Path,
) -> Params:
    """Parameters after joint training on the transitions of `sources` and the reward labels of
    `episodes`; one whose weight in the config is 0 is left out."""
    frozen = {k: v for k, v in params.items() if k in world.frozen}
    trained = fit(
        joint_loss(config, world),
        {k: v for k, v in params.items() if k not in world.frozen},
        frozen,
        joint_batches(config, world, params, sources, episodes),
        dataclass_from(Training, config.world_model.training),
        Run.of(
            config,
            "world model",
            directory,
            stream(config.seed, "dynamics"),
            checkpoint_origin(config, ["world_model"], params["statistics"]),
        ),
    )
    return {**jax.device_get(frozen), **jax.device_get(trained)}


def joint_batches(
    config: Config, world: UMMWorld, params: Params, sources: Source, episodes: list[Episode]
) -> Callable[[int], Iterator[Any]]:
    """`batches(i)` for `joint_loss`: transitions of `sources` and reward labels of `episodes`."""
    section = config.world_model
    if world.config.vae is None:
        sources = sources.map(lambda transition, *_: (transition, None))
    else:
        sources = _with_moments(world, params, sources, episodes)
    no, yes = by_label(reward_examples(episodes, observation_builder(config)))
    yes_share = section.reward_yes_fraction

    def mixed_batches(first: int):
        dynamics = batches(
            sources,
            section.dynamics_batch_size,
            stream(config.seed, "dynamics_batches"),
            start_step=first,
        )
        reward = batches(
            (no, yes),
            section.reward_batch_size,
            stream(config.seed, "reward_batches"),
            start_step=first,
            weights=(1.0 - yes_share, yes_share),
        )
        return zip(dynamics, reward)

    return mixed_batches


def joint_loss(config: Config, world: UMMWorld) -> LossFn:
    """The weighted sum of the dynamics' and the reward's loss on (Transition, RewardExample)."""
    section = config.world_model

    def loss_fn(trained, frozen, batch, key):
        (transition, moments), example = batch
        everything = {**trained, **frozen}
        loss, metrics = 0.0, {}
        if section.dynamics_weight:
            dynamics, metrics = world.dynamics_loss(everything, transition, key, moments)
            loss += section.dynamics_weight * dynamics
        if section.reward_weight:
            reward, reward_metrics = world.reward_loss(everything, example)
            loss += section.reward_weight * reward
            metrics = {**metrics, **reward_metrics}
        return loss, metrics

    return loss_fn


def _with_moments(
    world: UMMWorld, params: Params, sources: Source, episodes: list[Episode]
) -> Source:
    """Records (transition, its latents' moments now and later), each frame encoded once: the
    autoencoder is frozen, and training comes back to every frame many times."""
    encode, vae = jax.jit(world.autoencoder.moments), jax.device_put({"vae": params["vae"]})
    first = np.cumsum([0, *(len(e.timesteps) for e in episodes)])
    parts, moments = equal_parts(first[-1], ENCODED_FRAMES), {}
    for camera in world.cameras:
        frames = np.concatenate([e.images[camera] for e in episodes])
        encoded = [
            np.asarray(encode(vae, frames[rows]))
            for rows in tqdm(parts, desc=f"encoding {camera} frames")
        ]
        moments[camera] = np.concatenate(encoded)

    def record(transition, e, now, later):
        return transition, tuple(
            {camera: x[first[e] + frame] for camera, x in moments.items()} for frame in (now, later)
        )

    return sources.map(record)
