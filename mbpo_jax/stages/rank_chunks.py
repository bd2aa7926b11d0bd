"""Policy optimisation by ranking: of several branches that the policy would try from a state, those
that imagination ranks highest are what it is fine-tuned on next (reward-ranked fine-tuning, RAFT,
arXiv 2304.06767; the choice is that of `selection.best_of`).

What it may gain over choosing while acting is an average: a ranking that is right a little more
often than not is often wrong about one state's chunks, and rarely about those of a thousand like
it. Where the ranking errs in one direction, so does the average.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mbpo_jax.data.pipelines import Source, collate, equal_parts, process_rows
from mbpo_jax.files import atomic_write
from mbpo_jax.mbpo import chunk_discount
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.selection import proposals
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.finetune_policy import imitate
from mbpo_jax.stages.imagination import branch_keys
from mbpo_jax.stages.workspace import StageError
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import frozen_weight_sharding, on_mesh, shard_batch
from mbpo_jax.types import Array, Demonstration, Observation, Params, WorldModel


def finetune_on_best(
    config: Config,
    policy: FlowPolicy,
    world: WorldModel,
    params: Params,
    world_params: Params,
    starts: Source,
    *,
    directory: Path,
    origin: Mapping[str, Any],
    trainable: Params | None = None,
) -> tuple[Params, dict]:
    """From `rl.ranked.start_states` of the observations `starts` (one may come several times),
    `rl.group_size` branches of `rl.ranked.chunks` chunks each: flow matching on the chunks of the
    `rl.ranked.kept` best of each group, up to where the task is probably done. With
    `rl.exchange_advantages` the kept ones are drawn at random: a control.

    A run that is killed continues in `directory`, where the kept branches are.

    Returns:
        the improved {"actor", "critic"} parameters, and a summary: "score", the expected return of
        all branches, of the "kept_score" ones, and their "score_std" within groups.

    Raises:
        StageError: there are no start states.
        FloatingPointError, Interrupted, OSError: as `imitate`.
    """
    ranked = config.rl.ranked
    if not len(starts):
        raise StageError("there is no state to start from: collect more rollouts")
    random = np.random.default_rng(stream(config.seed, "improve_starts"))
    drawn = starts.where(np.resize(random.permutation(len(starts)), ranked.start_states))
    run = Run.of(config, "policy optimisation", directory, config.seed, origin)
    at_rest, _ = frozen_weight_sharding(
        world_params, run.mesh, run.rules, config.parallel.world_model
    )
    found = _imagined(
        config,
        ranking(config, policy, world, run.mesh),
        (jax.jit(policy.for_inference)(params), jax.device_put(world_params, at_rest)),
        drawn,
        run,
    )

    def example(row: int, chunk: int, branch: int) -> Demonstration:
        observation = drawn[row]
        if chunk:
            seen = (row, chunk - 1, branch)
            observation = observation.replace(
                images={name: found[f"view_{name}"][seen] for name in observation.images},
                proprio=found["proprio"][seen],
            )
        return Demonstration(observation, found["actions"][row, chunk, branch], np.float32(1.0))

    pool = Source(example, np.argwhere(found["going_on"] > 0.5))
    seed = stream(config.seed, "improve_batches")
    actor = imitate(policy, params["actor"], pool, ranked, seed, run, trainable)
    score, best = found["score"], found["best"]
    return {**params, "actor": actor}, {
        "imagined_chunks": score.size * ranked.chunks,
        "chunks_learnt": len(pool),
        "updates": ranked.steps,
        "score": float(score.mean()),
        "kept_score": float(np.take_along_axis(score, best, axis=1).mean()),
        "score_std": float(np.sqrt(score.var(axis=1).mean())),
    }


def ranking(
    config: Config, policy: FlowPolicy, world: WorldModel, mesh: Mesh
) -> Callable[[tuple[Params, Params], Observation, Array], dict[str, Array]]:
    """The jitted function `((policy's, world model's parameters), observations [S], keys [S]) ->
    "score" [S, G] of all branches, and of the "best" [S, kept]: "actions" and "going_on"
    [S, n, kept, ...], "proprio" and "view_CAMERA" [S, n - 1, kept, ...] of what is imagined."""
    rl = config.rl
    propose = proposals(
        policy,
        world,
        rl.group_size,
        *chunk_discount(rl.discount, config.chunk, rl.discount_per),
        chunks=rl.ranked.chunks,
    )

    def one(arguments, start, key):
        found = propose(arguments, jax.tree.map(lambda x: x[None], start), key)
        ranks = found.score
        if rl.exchange_advantages:
            ranks = jax.random.uniform(jax.random.fold_in(key, rl.group_size + 1), ranks.shape)
        best = jax.lax.top_k(ranks, rl.ranked.kept)[1]
        kept = jax.tree.map(
            lambda x: x[:, best], (found.actions, found.going_on, found.observation)
        )
        actions, going_on, observation = kept
        views = {f"view_{name}": x[1:] for name, x in observation.images.items()}
        proprio = observation.proprio[1:]
        return views | {
            "score": found.score,
            "best": best,
            "actions": actions,
            "going_on": going_on,
            "proprio": proprio,
        }

    def rank(params, start, keys):
        acting, world_params = params
        _, in_use = frozen_weight_sharding(
            world_params, mesh, config.parallel.rules, config.parallel.world_model
        )
        world_params = jax.device_put(world_params, in_use)
        arguments = {"policy": acting, "value": acting, "world": world_params}
        return jax.vmap(partial(one, arguments))(start, keys)

    everywhere = NamedSharding(mesh, PartitionSpec())  # every process learns from all of them
    return jax.jit(on_mesh(rank, mesh), out_shardings=everywhere)


def starts_at_a_time(config: Config, mesh: Mesh) -> int:
    """S of `ranking`: with `rl.imagination_batch` branches in all, or one start on every device."""
    rl = config.rl
    return max(1, rl.imagination_batch // rl.group_size // mesh.size) * mesh.size


def _imagined(
    config: Config,
    program: Callable[..., dict[str, Array]],
    params: tuple[Params, Params],
    starts: Source,
    run: Run,
) -> dict[str, np.ndarray]:
    """What `program` (`ranking`) finds from all of `starts`; finished parts are kept."""
    key = jax.random.key(stream(config.seed, "improve"))
    count = starts_at_a_time(config, run.mesh)
    kept = run.directory / "ranked"
    kept.mkdir(exist_ok=True)
    finished = {path.name for path in kept.glob("*.npz")}
    found = []
    parts = tqdm(equal_parts(len(starts), count), desc="ranking chunks", unit="batch")
    for i, part in enumerate(parts):
        path = kept / f"{i:05d}.npz"
        if path.name in finished:
            with np.load(path) as file:
                found.append(dict(file))
        else:
            mine = part[process_rows(count)]
            batch = shard_batch(collate([starts[row] for row in mine]), run.mesh)
            keys = shard_batch(branch_keys(key, mine), run.mesh)
            found.append(jax.device_get(program(params, batch, keys)))
            if jax.process_index() == 0:
                with atomic_write(path, "wb") as file:
                    np.savez(file, **found[-1])
    return {name: np.concatenate([x[name] for x in found])[: len(starts)] for name in found[0]}
