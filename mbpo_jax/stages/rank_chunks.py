"""Policy optimisation by ranking: of several chunks that the policy would try in a state, those
that imagination ranks highest are what it is fine-tuned on next (reward-ranked fine-tuning, RAFT,
arXiv 2304.06767; the choice is that of `selection.best_of`).

What it gains over choosing while acting is an average: a ranking that is right a little more often
than not is often wrong about one state's chunks, and rarely about those of a thousand like it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mbpo_jax.data.pipelines import Source, batches, collate, process_rows
from mbpo_jax.mbpo import chunk_discount
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.selection import proposals
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.finetune_policy import flow_matching_loss
from mbpo_jax.stages.workspace import StageError
from mbpo_jax.training.loop import Training, fit
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import frozen_weight_sharding, on_mesh, shard_batch
from mbpo_jax.types import Demonstration, Params, WorldModel


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
    `rl.group_size` chunks each, imagined `rl.ranked.chunks` far: flow matching on the
    `rl.ranked.kept` best of each group. With `rl.exchange_advantages` each group has its
    neighbour's ranks: a control.

    A run that is killed continues in `directory`, where the ranked chunks are kept.

    Returns:
        the improved {"actor", "critic"} parameters, and a summary: "score", the expected return of
        all chunks, of the "kept_score" ones, and their "score_std" within groups.

    Raises:
        StageError: there are no start states.
        FloatingPointError, Interrupted, OSError: as `fit`.
    """
    ranked = config.rl.ranked
    if not len(starts):
        raise StageError("there is no state to start from: collect more rollouts")
    random = np.random.default_rng(stream(config.seed, "improve_starts"))
    rows = np.resize(random.permutation(len(starts)), ranked.start_states)
    run = Run.of(config, "policy optimisation", directory, config.seed, origin)
    found = _imagined(config, policy, world, params, world_params, starts, rows, run)
    chunks, score = found["chunks"], found["score"]
    ranks = np.roll(score, 1, axis=0) if config.rl.exchange_advantages else score
    best = np.argsort(-ranks, axis=1, kind="stable")[:, : ranked.kept]

    def example(row: int, chunk: int) -> Demonstration:
        return Demonstration(starts[rows[row]], chunks[row, chunk], np.float32(1.0))

    pool = Source(example, [(i, j) for i in range(len(rows)) for j in best[i]])
    seed = stream(config.seed, "improve_batches")
    actor = fit(
        flow_matching_loss(policy),
        params["actor"],
        {},
        lambda first: batches(pool, ranked.batch_size, seed, start_step=first),
        Training.of(ranked),
        run,
        trainable,
    )
    return {**params, "actor": actor}, {
        "imagined_chunks": score.size * ranked.chunks,
        "updates": ranked.steps,
        "score": float(score.mean()),
        "kept_score": float(np.take_along_axis(score, best, axis=1).mean()),
        "score_std": float(np.sqrt(score.var(axis=1).mean())),
    }


def _imagined(
    config: Config,
    policy: FlowPolicy,
    world: WorldModel,
    params: Params,
    world_params: Params,
    starts: Source,
    rows: np.ndarray,
    run: Run,
) -> dict[str, np.ndarray]:
    """From each of the rows of `starts` "chunks" [S, size, k, A], and their "score" [S, size]."""
    rl = config.rl
    propose = proposals(
        policy,
        world,
        rl.group_size,
        *chunk_discount(rl.discount, config.chunk, rl.discount_per),
        chunks=rl.ranked.chunks,
    )
    acting = jax.jit(policy.for_inference)(params)
    at_rest, in_use = frozen_weight_sharding(
        world_params, run.mesh, run.rules, config.parallel.world_model
    )
    world_params = jax.device_put(world_params, at_rest)

    def propose_all(acting, world_params, start, keys):
        world_params = jax.device_put(world_params, in_use)
        arguments = {"policy": acting, "value": acting, "world": world_params}

        def one(observation, key):
            return propose(arguments, jax.tree.map(lambda x: x[None], observation), key)

        return jax.vmap(one)(start, keys)

    everywhere = NamedSharding(run.mesh, PartitionSpec())  # every process learns from all of them
    program = jax.jit(on_mesh(propose_all, run.mesh), out_shardings=everywhere)
    key = jax.random.key(stream(config.seed, "improve"))
    count = max(1, rl.imagination_batch // rl.group_size // run.mesh.size) * run.mesh.size
    kept = run.directory / "ranked"
    kept.mkdir(exist_ok=True)
    finished = {path.name for path in kept.glob("*.npz")}
    found = []
    # One shape, hence one compilation: the last part is filled up with earlier rows.
    parts = np.resize(np.arange(len(rows)), (-(-len(rows) // count), count))
    for i, part in enumerate(tqdm(parts, desc="ranking chunks", unit="batch")):
        path = kept / f"{i:05d}.npz"
        if path.name in finished:
            with np.load(path) as file:
                found.append(dict(file))
        else:
            mine = part[process_rows(count)]
            batch = shard_batch(collate([starts[rows[j]] for j in mine]), run.mesh)
            keys = shard_batch(jax.vmap(jax.random.fold_in, (None, 0))(key, mine), run.mesh)
            chunks, score = jax.device_get(program(acting, world_params, batch, keys))
            found.append({"chunks": chunks, "score": score})
            if jax.process_index() == 0:
                _save(path, found[-1])
    whole = {name: np.concatenate([x[name] for x in found]) for name in ("chunks", "score")}
    return {name: x[: len(rows)] for name, x in whole.items()}


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)
    unfinished.replace(path)
