"""Imagined chunks per second, where their time goes, and the same work done the reference's way."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.flops import matmul_flops
from experiments.benchmarks.policy import neutral_stats
from experiments.benchmarks.reference_stack import (
    ReferenceImagination,
    ServedWorld,
    SteppedWorld,
    world_process,
)
from experiments.benchmarks.timing import interleave, matmul_peak, measured, timed
from experiments.benchmarks.world_model import awake
from mbpo_jax.mbpo import imagine
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.stages.build import Config, build_policy, build_world_model, observation_builder
from mbpo_jax.stages.imagination import ROW_AXES, branch_keys
from mbpo_jax.training.sharding import make_mesh, map_rows, shard_batch
from mbpo_jax.types import Observation, Params
from mbpo_jax.world_model import config as world_config
from mbpo_jax.world_model.frames import Frame
from mbpo_jax.world_model.umm_world import UMMWorld

INSTRUCTION = "pick up the book and place it in the back compartment of the caddy"
PROPRIO = 8  # LIBERO's end-effector position, axis-angle and two fingers


def run(config: Config, size: str, repeats: int) -> list[dict]:
    """Rows at the config's branch length and imagination batch: the whole branch beside the
    reference's way of doing it, the same with what is precomputed of the start states, then the
    parts of a branch of ours, then those of the reference's. Optimisation precomputes each start
    state once and starts several branches there; the reference encodes it for each of them.

    The whole is spread over all devices; a part is timed as a program of its own on one, times how
    often a branch needs it; "share" is its time over that of all parts. The whole may take less
    than its parts, since one program reads each array once.
    """
    chunks, batch = config.rl.branch_chunks, config.rl.imagination_batch
    policy, world, params, world_params = models(config)
    start, key = start_states(config, batch), jax.random.key(2)

    def branches(params, world_params, start, keys, precomputed):
        threshold = config.rl.reward_threshold
        return imagine(
            policy,
            world,
            params,
            world_params,
            start,
            keys,
            precomputed,
            chunks=chunks,
            reward_threshold=threshold,
        )

    mesh = make_mesh()
    whole = map_rows(branches, mesh, "shard_map", (None, None, 0, 0, 0), ROW_AXES)
    everywhere = jax.device_put((params, world_params), NamedSharding(mesh, PartitionSpec()))
    precompute = map_rows(world.precompute, mesh, "shard_map", (None, 0, None), 0)
    preparation = (everywhere[1], shard_batch(start, mesh), key)
    precomputed = jax.device_get(precompute(*preparation))
    rows = start, branch_keys(key, np.arange(batch)), precomputed
    arguments = (*everywhere, *shard_batch(rows, mesh))
    parts = _parts(policy, _kind(SteppedWorld, world), params, world_params, start, key, chunks)
    runs = {"ours": timed(whole, *arguments)}
    runs["precompute"] = timed(precompute, *preparation)
    runs |= {name: timed(jax.jit(part), *inputs) for name, (part, inputs, _) in parts.items()}
    spent: list[dict[str, float]] = []
    with world_process(_kind(ServedWorld, world), world_params) as ask:
        reference = ReferenceImagination(policy, ask, world.cameras, chunks)

        def peer() -> float:
            started = time.perf_counter()
            reference(params, start, key)
            elapsed = time.perf_counter() - started
            spent.append(reference.seconds)
            return elapsed

        seconds = interleave(runs | {"peer": peer}, repeats, f"{size}, {batch} branches")

    peak = matmul_peak(
        jnp.dtype(config.world_model.model.mot.dtype),
        1024 if jax.default_backend() == "cpu" else 8192,
    )
    row = {"size": size, "batch": batch}

    def whole_row(work: str, ours: np.ndarray, flops: int) -> dict:
        found = measured({"ours": ours, "peer": seconds["peer"]}, flops, peak)
        rates = {
            "chunks_per_second": batch * chunks / found["seconds"],
            "peer_chunks_per_second": batch * chunks / found["peer_seconds"],
        }
        return row | {"work": work, "devices": mesh.size} | found | rates

    flops = matmul_flops(branches, *arguments)
    branch = whole_row(f"{chunks} chunks", seconds["ours"], flops)
    flops += matmul_flops(world.precompute, world_params, start, key)
    ours = seconds["ours"] + seconds["precompute"]
    prepared = whole_row(f"{chunks} chunks, start states too", ours, flops)
    rows = [
        row
        | {"work": name}
        | measured({"ours": times * seconds[name]}, times * matmul_flops(part, *inputs), peak)
        for name, (part, inputs, times) in parts.items()
    ]
    theirs = [
        row | {"work": f"reference, {name}", "seconds": _median(spent[1:], name)}
        for name in spent[0]
    ]
    return [branch, prepared, *_with_shares(rows), *_with_shares(theirs)]


def models(config: Config) -> tuple[FlowPolicy, UMMWorld, Params, Params]:
    """The config's policy and world model with random parameters, whose predictions vary. The
    server of the reference speaks latents, so a model of composed views is replaced by one that has
    as many layers and an autoencoder."""
    model = config.world_model.model
    if model.prediction == "composed":
        name = "latent" if config.image_size == 64 else "latent_small"
        latent = ml_collections.ConfigDict(dataclasses.asdict(world_config.variant(name)))
        for part, layers in (("mot", "num_layers"), ("vit", "num_layers")):
            latent[part][layers] = model[part][layers]
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.world_model.model = latent
    robot = config.robot
    stats = {
        "actions": neutral_stats(len(robot.actions)),
        "state": neutral_stats(len(robot.states)),
    }
    policy = build_policy(config, stats)
    world = build_world_model(config)
    params = jax.jit(policy.init)(jax.random.key(0))
    return policy, world, params, awake(jax.jit(world.init)(jax.random.key(0)))


def start_states(config: Config, batch: int) -> Observation:
    """`batch` observations of noise in host memory."""
    rng = np.random.default_rng(0)
    size = (batch, config.image_size, config.image_size, 3)
    images = {camera: rng.integers(0, 256, size).astype(np.uint8) for camera in config.cameras}
    proprio = np.zeros((batch, PROPRIO), np.float32)
    return observation_builder(config)(images, proprio, INSTRUCTION)


def _kind(kind: type[SteppedWorld], world: UMMWorld) -> SteppedWorld:
    """The same world model as another class."""
    sizes = (world.image_size, world.action_dim, world.chunk)
    return kind(world.config, world.cameras, *sizes, world.tokenizer)


def _parts(
    policy: FlowPolicy,
    world: SteppedWorld,
    params: Params,
    world_params: Params,
    start: Observation,
    key: jax.Array,
    chunks: int,
) -> dict[str, tuple[Callable, tuple, int]]:
    """Name -> (function, arguments, times) of everything a branch needs, on inputs as it has them,
    and how many times it does."""

    def act(params, observation, key):
        return policy.sample(params, policy.encode(params, observation), key)

    prefix = jax.jit(policy.encode)(params, start)
    actions = jax.jit(act)(params, start, key).actions
    precomputed = jax.jit(world.precompute)(world_params, start, key)
    state = jax.jit(world.encode)(world_params, start, key, precomputed)
    frames = state.memory
    parts = {
        "policy": (act, (params, start, key), chunks),
        "value": (policy.value, (params, prefix), chunks + 1),
        "start": (world.encode, (world_params, start, key, precomputed), 1),
        "reward": (world.success_probability, (world_params, state), chunks),
    }
    done: dict[str, Frame] = {}
    for camera in world.cameras:
        view = functools.partial(world.view, camera=camera)
        picture = functools.partial(world.picture, camera=camera)
        tokens = frames[camera].tokens
        inputs = (world_params, start, frames, dict(done), actions, key)
        parts[f"dynamics {camera}"] = (view, inputs, chunks)
        parts[f"picture {camera}"] = (picture, (world_params, tokens), chunks)
        # The first view computes the features that are missing, for later views too.
        frames = {c: jax.jit(world.seen)(world_params, frame) for c, frame in frames.items()}
        done[camera] = frames[camera]
    return parts


def _median(spent: list[dict[str, float]], name: str) -> float:
    return float(np.median([seconds[name] for seconds in spent]))


def _with_shares(rows: list[dict]) -> list[dict]:
    total = sum(row["seconds"] for row in rows)
    return [row | {"share": row["seconds"] / total} for row in rows]
