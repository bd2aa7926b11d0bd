"""Stage `value`: the critic is fitted to the returns of recorded episodes before any update."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import mannwhitneyu

from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import (
    Source,
    branch_starts,
    collate,
    equal_parts,
    transitions,
)
from mbpo_jax.episode import Episode
from mbpo_jax.mbpo import chunk_discount
from mbpo_jax.policy import critic
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    Config,
    abstract_params,
    build_policy,
    load_world_model,
    observation_builder,
)
from mbpo_jax.stages.finetune_world_model import world_model_episodes
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.types import Array, Observation, Params, WorldModel
from mbpo_jax.world_model import metrics

_BATCH = 64


def fit_value(workspace: Workspace, directory: Path) -> dict:
    """Fits the critic to real frames of the training rollouts and to the frames that the world
    model imagines a chunk after them; writes `critic/` and how well it orders held-out frames.
    Demonstrations are left out: they all succeed, and tell what the expert's states are worth.

    With `value.steps` at 0 the critic is a fresh one, as in the paper.

    Raises:
        StageError: no episode ends behind any frame.
    """
    config = workspace.config
    workspace.require("world_model")
    sft = workspace.directory("sft")
    policy = build_policy(config, read_norm_stats(sft / "norm_stats.json"))
    params = load_params(sft / "policy", abstract_params(policy))
    if not config.value.steps:
        save_params(directory / "critic", params["critic"])
        return {"steps": 0}
    world, world_params = load_world_model(config, workspace.root)
    world_params = world.for_inference(world_params)
    train, held_out = world_model_episodes(workspace, ["rollouts"])
    tables = [
        value_table(config, policy, params, world, world_params, episodes)
        for episodes in (train, held_out)
    ]
    features, returns = (
        np.concatenate([tables[0][kind][i] for kind in ("real", "imagined")]) for i in (0, 1)
    )
    if not len(returns):
        raise StageError("no frame of the training rollouts has a return to learn a value from")
    fit = jax.jit(critic.fit_critic, static_argnames="steps")
    fitted = fit(
        params["critic"],
        jnp.asarray(features),
        jnp.asarray(returns),
        jax.random.key(stream(config.seed, "value")),
        steps=config.value.steps,
    )
    save_params(directory / "critic", fitted)
    return {
        "steps": config.value.steps,
        "frames": len(returns),
        "held_out_episodes": len(held_out),
        "held_out": {kind: quality(fitted, *table) for kind, table in tables[1].items()},
    }


def chunk_returns(
    steps_left: Array, success: Array, chunk: int, discount: float, reward_weight: float
) -> Array:
    """Discounted return of states [N] of finished episodes, in chunks of `chunk` steps.

    Args:
        steps_left: int, environment steps until the episode's end, at least 1 in a success.
        success: bool, whether the episode succeeded.
        discount, reward_weight: per chunk and of a reward at a chunk's end (`chunk_discount`).

    Returns:
        w γ^(chunks left - 1) for a success, 0 for a failure.
    """
    chunks = jnp.ceil(jnp.asarray(steps_left) / chunk)
    return jnp.where(success, reward_weight * discount ** (chunks - 1.0), 0.0)


def value_table(
    config: Config,
    policy: FlowPolicy,
    params: Params,
    world: WorldModel,
    world_params: Params,
    episodes: list[Episode],
) -> dict[str, tuple[Array, Array]]:
    """The policy's features [N, D] of "real" and of "imagined" frames, and their returns [N].

    Imagined frames follow the recorded chunk; where the episode has ended by then there is none.
    """
    rl, builder = config.rl, observation_builder(config)
    discount, weight = chunk_discount(rl.discount, config.chunk, rl.discount_per)

    def returns(rows):
        left = [episodes[e].length - episodes[e].timesteps[f] for e, f in rows]
        success = [bool(episodes[e].success) for e, _ in rows]
        left, success = np.asarray(left, np.float32), np.asarray(success, bool)
        return np.asarray(chunk_returns(left, success, config.chunk, discount, weight))

    @jax.jit
    def features(observation):
        return policy.encode(params, observation).features

    def all_features(observation: Observation):
        count = len(observation.proprio)
        parts = [
            features(jax.tree.map(lambda x, r=rows: x[r], observation))
            for rows in equal_parts(count, _BATCH)
        ]
        return np.concatenate([np.asarray(x) for x in parts])[:count]

    nothing = np.zeros((0, policy.config.language.width), np.float32), np.zeros(0, np.float32)
    starts = branch_starts(episodes, builder)
    tables = {"real": nothing, "imagined": nothing}
    if len(starts):
        observation = collate([starts[i] for i in range(len(starts))])
        tables["real"] = all_features(observation), returns(starts.index)
    source: Source = transitions(episodes, builder, config.chunk)
    goes_on = [
        episodes[e].length > episodes[e].timesteps[f] or not episodes[e].success
        for e, _, f in source.index
    ]
    source = source.where(np.asarray(goes_on, bool))
    if len(source):
        followed = collate([source[i] for i in range(len(source))])
        key = jax.random.key(stream(config.seed, "value_imagination"))
        imagined = metrics.imagine_chunk(world, world_params, followed, key)
        tables["imagined"] = all_features(imagined), returns(source.index[:, [0, 2]])
    return tables


def quality(layers: Params, features: Array, returns: Array) -> dict:
    """How a critic's values relate to returns: "auc" of telling episodes that will succeed from
    those that will not, "r2", and "bins" of rising value (mean value, mean return, frames)."""
    if not len(returns):
        return {"frames": 0}
    value = np.asarray(critic.apply(layers, jnp.asarray(features)).min(axis=0))
    groups = np.array_split(np.argsort(value, kind="stable"), min(10, len(value)))
    return {
        "frames": len(returns),
        "auc": auc(value, returns > 0),
        "r2": float(1 - np.square(value - returns).mean() / max(returns.var(), 1e-9)),
        "bins": [[float(value[g].mean()), float(returns[g].mean()), len(g)] for g in groups],
    }


def auc(score: Array, label: Array) -> float:
    """Area under the ROC curve: how often a positive scores above a negative (ties count half);
    NaN without both kinds."""
    score, label = np.asarray(score), np.asarray(label) > 0.5
    pairs = label.sum() * (~label).sum()
    if not pairs:
        return float("nan")
    return float(mannwhitneyu(score[label], score[~label]).statistic / pairs)
