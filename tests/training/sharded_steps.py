"""Training steps and branched rollouts on several meshes, as functions and as a program.

`python -m tests.training.sharded_steps OUT --toys=4x2,1x8 --networks=4x2` computes `toy_runs` and
`network_steps` on the named meshes of 8 virtual devices ("4x2" is data x fsdp, "pmap" is mapped by
pmap) into OUT/results.npz. With --process, --processes and --port it is one of several processes
that share the devices.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.experimental import multihost_utils

from configs.libero_long import get_config
from mbpo_jax.data.pipelines import Source, batches
from mbpo_jax.mbpo import MBPO, Settings
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.stages.build import dataclass_from
from mbpo_jax.stages.finetune_policy import flow_matching_loss
from mbpo_jax.stages.imagination import programs
from mbpo_jax.stages.optimize_policy import optimize_policy
from mbpo_jax.stages.train_dynamics import joint_loss
from mbpo_jax.toy import ToyPolicy, ToyWorld, observation
from mbpo_jax.training.loop import LossFn, Training, fit, initial_state, jit_step, train_step
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import (
    frozen_weight_sharding,
    make_mesh,
    parameter_sharding,
    shard_batch,
    start_processes,
)
from mbpo_jax.types import Demonstration, RewardExample, Transition
from mbpo_jax.world_model.statistics import neutral_statistics
from mbpo_jax.world_model.umm_world import UMMWorld
from tests.policy.conftest import LIMITS, TINY, make_observation, stats
from tests.world_model import conftest as tiny_world

RULES = get_config("micro").parallel.rules
CAMERAS = ("agentview",)  # one view halves the time to compile
ROWS = 16
ACTION_DIM = 3
TRAININGS = ("sft", "world model", "autoencoder")


def config(mesh: str, rollout="shard_map", world_model="replicated") -> ml_collections.ConfigDict:
    c = get_config("micro").copy_and_resolve_references()
    c.unlock()
    c.chunk, c.loggers = TINY.chunk, ()
    c.parallel.update({"rollout": rollout, "world_model": world_model, "fsdp": int(mesh[-1])})
    c.rl.update({"start_states": ROWS, "imagination_batch": 8, "minibatch_size": 16})
    c.rl.update({"gradient_accumulation": 2, "critic_warmup": 0, "updates": 5})
    c.rl.update({"branch_chunks": 2, "group_size": 2, "anchor_weight": 0.0})
    c.rl.flow.method = "sde"
    c.rl.flow.steps = 3
    return c


@functools.cache
def models() -> tuple[FlowPolicy, dict, UMMWorld, dict]:
    policy = FlowPolicy(TINY, stats(ACTION_DIM), stats(4), CAMERAS, LIMITS)
    tokenizer = tiny_world.WordTokenizer()
    world = UMMWorld(tiny_world.TINY, CAMERAS, 16, ACTION_DIM, TINY.chunk, tokenizer)
    statistics = jax.tree.map(np.asarray, neutral_statistics(world.config, CAMERAS, ACTION_DIM))
    return (
        policy,
        random_tree(policy.init),
        world,
        {**random_tree(world.init), "statistics": statistics},
    )


def random_tree(init) -> dict:
    """Parameters without zeros, of a size that lets signals through; made without compiling."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))

    def draw(x):
        deviation = x.shape[-2] ** -0.5 if x.ndim > 1 else 0.1
        return (deviation * rng.normal(size=x.shape)).astype(x.dtype)

    return jax.tree.map(draw, shapes)


def seen(seed: int):
    found = make_observation(ROWS, seed)
    return found.replace(images={camera: found.images[camera] for camera in CAMERAS})


@functools.cache
def work() -> dict[str, tuple[LossFn, dict, dict, object, int]]:
    """Name -> (loss, trained parameters, frozen ones, batch, gradient accumulation)."""
    policy, params, world, world_params = models()
    rng = np.random.default_rng(2)
    actions = rng.uniform(-0.5, 0.5, (ROWS, TINY.chunk, ACTION_DIM)).astype(np.float32)
    later = seen(3)
    transition = Transition(seen(0), actions, later.images, later.proprio)
    moments = tuple({"agentview": rng.normal(size=(ROWS, 4, 4, 8))} for _ in ("now", "later"))
    moments = jax.tree.map(np.float32, moments)
    label = rng.integers(0, 2, ROWS).astype(np.float32)
    trained = {k: v for k, v in world_params.items() if k not in world.frozen}
    frozen = {k: v for k, v in world_params.items() if k in world.frozen}

    def vae_loss(vae, frozen, images, key):
        return world.autoencoder.loss(vae, images, key)

    return {
        "sft": (
            flow_matching_loss(policy),
            params["actor"],
            {},
            Demonstration(seen(0), actions, np.ones(ROWS, np.float32)),
            2,
        ),
        "world model": (
            joint_loss(config("1x1"), world),
            trained,
            frozen,
            ((transition, moments), RewardExample(seen(4), label)),
            1,
        ),
        "autoencoder": (vae_loss, world_params["vae"], {}, seen(0).images["agentview"], 1),
    }


@functools.cache
def step_of(name: str):
    """The same function for all meshes, so that it is traced once."""
    loss_fn, *_, slices = work()[name]
    return train_step(loss_fn, optax.sgd(1.0), 0.99, slices)


def network_steps(mesh: str, trainings=TRAININGS, world_model="replicated") -> dict:
    """One step of each training and the branches of one refill, of the tiny networks. Gradient
    descent has rate 1, so that the change of a parameter is its gradient."""
    mesh, rollout = ("8x1", "pmap") if mesh == "pmap" else (mesh, "shard_map")
    devices = jax.devices()[: int(mesh[0]) * int(mesh[-1])]
    placed, key = make_mesh(int(mesh[-1]), devices), jax.random.key(5)
    results = {}
    for name in trainings:
        _, start, fixed, batch, slices = work()[name]
        state = initial_state(start, optax.sgd(1.0))
        shardings = parameter_sharding(state, placed, RULES)
        state = jax.device_put(state, shardings)
        fixed = jax.device_put(fixed, parameter_sharding(fixed, placed, RULES))
        rows = shard_batch(batch, placed, slices)
        state, metrics = jit_step(step_of(name), shardings)(state, fixed, rows, key)
        results[name] = {"metrics": metrics, "gradient": change(start, state.params)}

    policy, params, world, world_params = models()
    settings = config(mesh, rollout, world_model)
    mbpo = MBPO(policy, dataclass_from(Settings, settings.rl), settings.chunk)
    mbpo.actor_tx = mbpo.critic_tx = optax.sgd(1.0)
    state = mbpo.init(params)
    shardings = parameter_sharding(state, placed, RULES)
    state = jax.device_put(state, shardings)
    at_rest = frozen_weight_sharding(world_params, placed, RULES, world_model)[0]
    world_params = jax.device_put(world_params, at_rest)
    refill, _, _, update = programs(settings, mbpo, world, placed, shardings)
    start = seen(0), world.precompute(world_params, seen(0), key)
    branch = refill(state.params, world_params, shard_batch(start, placed), key)
    state, metrics = update(state, branch, key)
    results["ppo"] = {"metrics": metrics, "gradient": change(params, state.params)}
    results["branch"] = branch
    return results


def change(before, after):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after)


def toy_training(mesh: str, directory: Path, steps: int, checkpoint_every: int = 3) -> dict:
    """Supervised training of a problem that compiles at once, up to `steps`."""
    rng = np.random.default_rng(0)
    records = rng.normal(size=(ROWS, 8)).astype(np.float32)
    source = Source(lambda i, _: records[i], [(i, 0) for i in range(ROWS)])

    def loss_fn(params, frozen, batch, key):
        noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
        loss = jnp.mean(jnp.square(noisy @ params["kernel"] - jnp.flip(batch, 1)))
        return loss, {"error": loss}

    return fit(
        loss_fn,
        {"kernel": np.eye(8, dtype=np.float32)},
        {},
        lambda step: batches(source, 8, 0, start_step=step),
        Training(
            steps=steps,
            learning_rate=0.1,
            warmup_steps=0,
            weight_decay=0.0,
            grad_clip=1.0,
            ema_decay=0.9,
            log_every=1,
            checkpoint_every=checkpoint_every,
        ),
        Run("toy", directory, 0, make_mesh(int(mesh[-1])), RULES, loggers=()),
    )


def toy_runs(mesh: str, directory: Path) -> dict:
    """The loops themselves on problems that compile at once: supervised training that is stopped,
    restored and continued, and policy optimisation. Optimiser states are split by a rule."""
    mesh, rollout = ("4x2", "pmap") if mesh == "pmap" else (mesh, "shard_map")
    for steps in (3, 5):
        average = toy_training(mesh, directory / "sft", steps)
    starts = Source(
        lambda i, _: jax.tree.map(lambda x: x[0], observation([0.4 + i / 32])),
        [(i, 0) for i in range(ROWS)],
    )
    policy = ToyPolicy()
    improved = optimize_policy(
        config(mesh, rollout),
        policy,
        ToyWorld(),
        jax.tree.map(np.asarray, policy.init()),
        {},
        starts,
        directory=directory / "improve",
    )
    metrics = {
        stage: np.frombuffer((directory / stage / "metrics.jsonl").read_bytes(), np.uint8)
        for stage in ("sft", "improve")
    }
    return {"average": average, "improved": improved, "metrics": metrics}


def flat(results: dict) -> dict[str, np.ndarray]:
    """Arrays under '/'-joined names, complete also where other processes hold parts."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    leaves = jax.tree_util.tree_leaves_with_path(results)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): whole(x) for p, x in leaves}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, help="steps of `toy_training` in OUT, nothing else")
    parser.add_argument("--toys", default="")
    parser.add_argument("--networks", default="")
    parser.add_argument("--trainings", default=",".join(TRAININGS))
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8 // options.processes)
    jax.config.update("jax_disable_most_optimizations", True)
    if options.processes > 1:
        start_processes(f"localhost:{options.port}", options.processes, options.process)
    if options.train:
        toy_training("4x2", options.out, options.train, checkpoint_every=10_000)
        return
    results = {}
    for mesh in filter(None, options.toys.split(",")):
        results[f"{mesh}/toy"] = flat(toy_runs(mesh, options.out / mesh))
    for mesh in filter(None, options.networks.split(",")):
        placement = {"2x4": "sharded", "1x8": "offloaded"}.get(mesh, "replicated")
        results[mesh] = flat(network_steps(mesh, options.trainings.split(","), placement))
    results = flat(results)
    if options.process == 0:
        np.savez(options.out / "results.npz", **results)


if __name__ == "__main__":
    main()
