"""Stage `siblings`: several chunks from one state, imagined and executed. Does imagination know
which of them leads to success?

Policy optimisation climbs the differences between such siblings, so what imagination knows of them
bounds what it can learn, however well it tells one state from another.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import branch_starts, collate, equal_parts
from mbpo_jax.envs.simulated_world import SimulatedWorld
from mbpo_jax.mbpo import chunk_discount
from mbpo_jax.seeds import stream
from mbpo_jax.selection import chunk_scores
from mbpo_jax.stages.acting import exploring
from mbpo_jax.stages.build import (
    Config,
    abstract_params,
    build_policy,
    load_world_model,
    observation_builder,
)
from mbpo_jax.stages.simulation import make_pool
from mbpo_jax.stages.statistics import within_groups
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.checkpoints import load_params
from mbpo_jax.types import Array, Observation, Params, Policy, WorldModel


def compare_siblings(workspace: Workspace, directory: Path) -> dict:
    """Draws states of rollouts and chunks from each, as rollouts do. The simulator executes each
    chunk and then, twice, what the policy does up to the episode's greatest length.

    Returns correlations within groups, with 95 % intervals (`within_groups`): "repeatable", of
    success in one continuation and in the other: what the first chunk decides; "imagined", of the
    expected return after 1, 2, … imagined chunks (`chunk_scores`) and the mean success; "real", the
    same after the one executed chunk; "gripper", of where the hand is imagined and is, a chunk
    later, and its "gripper_mm", one standard deviation. "gain": points of success by which the
    chunk that imagination prefers exceeds its group. Writes `siblings.npz`.

    Raises:
        ValueError: no episode can be continued in the simulator.
    """
    config = workspace.config
    workspace.require("value")
    size, count = config.siblings.group_size, config.siblings.start_states
    sft = workspace.directory("sft")
    policy = build_policy(config, read_norm_stats(sft / "norm_stats.json"))
    shapes = abstract_params(policy)
    params = load_params(sft / "policy", shapes)
    params["critic"] = load_params(workspace.directory("value") / "critic", shapes["critic"])
    params = jax.jit(policy.for_inference)(params)
    world, world_params = load_world_model(config, workspace.root)
    episodes = read_episodes(workspace.directory("rollouts") / "dataset")
    source = branch_starts(episodes, observation_builder(config))
    chunks = -(-config.max_steps // config.chunk)
    horizon = min(config.world_model.horizon, chunks)
    key = jax.random.key(stream(config.seed, "siblings"))
    act = jax.jit(exploring(policy, config.rollouts.noise_std))
    with make_pool(config) as pool:
        simulator = SimulatedWorld(pool, episodes, chunks)
        source = source.where(np.array([simulator.knows(x) for x in source], bool))
        drawn = np.random.default_rng(stream(config.seed, "siblings")).permutation(len(source))
        count = min(count, len(source))
        starts = collate([source[i] for i in drawn[:count] for _ in range(size)])
        first_key, dream_key, *keys = jax.random.split(key, 4)
        first = np.asarray(act(params, starts, first_key))
        run = partial(follow, config, policy, params=params, start=starts, first=first)
        dream = run(world, world.for_inference(world_params), key=dream_key, chunks=horizon)
        real = [
            run(simulator, {}, key=key, chunks=chunks, name=f"siblings, {i + 1} of 2")
            for i, key in enumerate(keys)
        ]
    outcomes = np.stack([1 - np.prod(1 - x["done"], axis=0) for x in real])
    success = outcomes.mean(0)
    imagined = expected_returns(config, dream)
    executed = expected_returns(config, real[0])[0]
    np.savez(
        directory / "siblings.npz",
        starts=source.index[drawn[:count]],
        first=first,
        outcomes=outcomes,
        imagined=imagined,
        executed=executed,
    )
    ahead, there = (x["proprio"][0, :, :3] for x in (dream, real[0]))
    preferred = imagined.reshape(horizon, count, size).argmax(-1)
    grouped = success.reshape(count, size)
    gain = grouped[np.arange(count), preferred] - grouped.mean(1)
    return {
        "start_states": count,
        "group_size": size,
        "success": float(success.mean()),
        "repeatable": within_groups(*outcomes, size),
        "imagined": [within_groups(score, success, size) for score in imagined],
        "real": within_groups(executed, success, size),
        "gripper": [within_groups(x, y, size) for x, y in zip(ahead.T, there.T)],
        "gripper_mm": float(1000 * np.sqrt(there.reshape(count, size, 3).var(1).sum(-1).mean())),
        "gain": [float(100 * x.mean()) for x in gain],
        "gain_std": [float(100 * x.std() / np.sqrt(count)) for x in gain],
    }


def follow(
    config: Config,
    policy: Policy,
    world: WorldModel,
    world_params: Params,
    *,
    params: Params,
    start: Observation,
    first: Array,
    key: Array,
    chunks: int,
    name: str = "siblings, imagined",
) -> dict[str, np.ndarray]:
    """The chunks `first` [M, k, A] and then what the policy does, `chunks` in all: after each,
    "done" (probability that the task is done) and "value" [n, M], "proprio" [n, M, P]."""

    @jax.jit
    def program(params, world_params, start, first, keys):
        def step(carry, now):
            state, actions = carry
            act_key, world_key = jax.random.split(now)
            state = world.step(world_params, state, actions, world_key)
            done = world.success_probability(world_params, state).astype(jnp.float32)
            value = policy.value(params, policy.encode(params, state.observation))
            actions = policy.act(params, state.observation, act_key)
            return (state, actions), (done, value, state.observation.proprio)

        carry = world.encode(world_params, start, keys[0]), first
        return jax.lax.scan(step, carry, keys)[1]

    parts = equal_parts(len(first), min(config.rl.imagination_batch, len(first)))
    seen = []
    for i, rows in enumerate(tqdm(parts, desc=name, unit="batch")):
        keys = jax.random.split(jax.random.fold_in(key, i), chunks)
        batch = jax.tree.map(lambda x, r=rows: x[r], start)
        seen.append(jax.device_get(program(params, world_params, batch, first[rows], keys)))
    found = [np.concatenate(x, axis=1)[:, : len(first)] for x in zip(*seen)]
    return dict(zip(("done", "value", "proprio"), found))


def expected_returns(config: Config, followed: dict[str, np.ndarray]) -> np.ndarray:
    """What `follow` promises [n, M] if it ended after the first, the second, … chunk."""
    rl = config.rl
    discount, weight = chunk_discount(rl.discount, config.chunk, rl.discount_per)
    scores = []
    for n, score in enumerate(followed["value"]):
        for done in followed["done"][n::-1]:
            score = chunk_scores(done, score, discount, weight)
        scores.append(score)
    return np.stack(scores)
