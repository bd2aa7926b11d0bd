"""What the input pipelines deliver beside what training consumes, on episodes of noise."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.imagination import INSTRUCTION, PROPRIO, models
from experiments.benchmarks.timing import Run, interleave, measured
from experiments.benchmarks.training import training_run
from mbpo_jax import seeds
from mbpo_jax.data.episodes import read_episodes, write_episodes
from mbpo_jax.data.pipelines import batches, demonstrations, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.stages.build import Config, observation_builder
from mbpo_jax.stages.train_dynamics import joint_batches, joint_loss

EPISODES, CHUNKS = 24, 10  # of data, and chunks in each


def run(config: Config, size: str, repeats: int) -> list[dict]:
    """Rows: reading a dataset, then for policy fine-tuning and for world-model training the time of
    a batch as "ours" beside that of the step it feeds as "peer". Batches are prepared while the
    device computes, so it starves where the ratio is above 1.

    "frames_per_second" counts images of all cameras, "episodes_per_second" stored episodes.
    """
    episodes = [_episode(config, i) for i in range(EPISODES)]
    frames = sum(len(e.timesteps) for e in episodes) * len(config.cameras)
    policy, world, params, world_params = models(config)
    builder = observation_builder(config)
    source = demonstrations(episodes, builder)
    sft = batches(source, config.sft.batch_size, seeds.stream(config.seed, "sft_batches"))

    def sft_loss(actor, frozen, batch, key):
        return policy.loss(actor, batch.observation, batch.actions, key, batch.quality)

    pairs = transitions(episodes, builder, config.chunk)
    joint = joint_batches(config, world, world_params, pairs, episodes)(0)
    trained, frozen = (
        {k: v for k, v in world_params.items() if (k in world.frozen) == still}
        for still in (False, True)
    )
    steps = {
        "policy fine-tuning": (sft, *training_run(sft_loss, params["actor"], {}, next(sft))),
        "world-model training": (
            joint,
            *training_run(joint_loss(config, world), trained, frozen, next(joint)),
        ),
    }

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "dataset"
        write_episodes(path, episodes)

        def read() -> float:
            started = time.perf_counter()
            read_episodes(path)
            return time.perf_counter() - started

        reading = interleave({"ours": read}, repeats, f"{size}, reading")
    row = {"size": size, "work": "reading episodes", "batch": EPISODES} | measured(reading)
    row["episodes_per_second"] = EPISODES / row["seconds"]
    rows = [row | {"frames_per_second": frames / row["seconds"]}]
    for work, (stream, step, _) in steps.items():
        seconds = interleave({"ours": _drawing(stream), "peer": step}, repeats, f"{size}, {work}")
        batch = next(stream)
        images = sum(x.shape[0] for x in jax.tree.leaves(batch) if x.dtype == np.uint8)
        row = {"size": size, "work": work, "batch": len(jax.tree.leaves(batch)[0])}
        row |= measured(seconds)
        rows.append(row | {"frames_per_second": images / row["seconds"]})
    return rows


def _drawing(stream: Iterator[Any]) -> Run:
    def draw() -> float:
        started = time.perf_counter()
        next(stream)
        return time.perf_counter() - started

    return draw


def _episode(config: Config, number: int) -> Episode:
    """An episode as the scripted expert leaves it: a frame every `render_every` steps and the last
    five, one in four a failure."""
    rng = np.random.default_rng(number)
    length = CHUNKS * config.chunk
    stride = config.demonstrations.render_every
    timesteps = np.union1d(np.arange(0, length, stride), np.arange(length - 4, length + 1))
    count, size = len(timesteps), config.image_size
    actions = rng.uniform(-1, 1, (count, config.chunk, config.action_dim)).astype(np.float32)
    shape = (count, size, size, 3)
    return Episode(
        suite=config.suite,
        task_id=config.tasks[0],
        instruction=INSTRUCTION,
        source="expert",
        seed=number,
        init_state_id=-1,
        success=bool(number % 4),
        length=length,
        goal_fraction=1.0,
        timesteps=timesteps.astype(np.int32),
        images={c: rng.integers(0, 256, shape, np.uint8) for c in config.cameras},
        proprio=rng.normal(size=(count, PROPRIO)).astype(np.float32),
        actions=actions,
        target_actions=actions,
        num_actions=np.minimum(config.chunk, length - timesteps).astype(np.int32),
    )
