"""ReinboT (arXiv 2505.07395): the policy learns all recorded chunks, each behind the return that
its episode still had, and acts on the largest return that it can expect.

The return is dense (section 4.1): how near the next sub-goal's pictures are, how many sub-goals are
behind, how smooth the actions are, and success at the end. Sub-goals are the frames where a gripper
is told to turn round, and the last one.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.compare import ensemble
from experiments.compare.idql import expectile_loss
from experiments.compare.imitation import continue_sft
from experiments.compare.recorded import fine_tuned, flat_actions, frame_features
from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.pipelines import demonstrations
from mbpo_jax.episode import Episode
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.stages.acting import Act
from mbpo_jax.stages.build import Config, abstract_params, load_policy, observation_builder
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.types import Array, Observation, Params


def train(workspace: Workspace, directory: Path) -> dict:
    """Fits what return to ask for, and the policy that is asked; writes `expected/`, `policy/`."""
    config, settings = workspace.config, workspace.config.compare.reinbot
    policy, params = fine_tuned(workspace)
    builder = observation_builder(config)
    episodes = [
        episode
        for stage in ("demonstrations", "rollouts")
        for episode in read_episodes(workspace.directory(stage) / "dataset")
    ]
    quality = ranks(episode_returns(config, policy, episodes))
    features = frame_features(policy, params, episodes, builder)
    expected = fit_expected(
        np.concatenate(features),
        np.concatenate(quality),
        jax.random.key(stream(config.seed, "expected_return")),
        width=settings.width,
        expectile=settings.expectile,
        steps=settings.expected_steps,
    )
    save_params(directory / "expected", expected)
    shown = demonstrations(episodes, builder)
    source = shown.map(lambda record, e, f: record.replace(quality=np.float32(quality[e][f])))
    learner, _ = fine_tuned(workspace, conditioned(config))
    continue_sft(workspace, directory, learner, params, [source])
    return {"chunks": len(source), "sub_goals": sum(len(sub_goals(config, e)) for e in episodes)}


def sub_goals(config: Config, episode: Episode) -> np.ndarray:
    """Frames of an episode at which a gripper's command has just changed its sign, and the last."""
    grippers = [config.robot.actions.index(name) for name in config.robot.grippers]
    closing = episode.actions[:, 0, grippers] > 0
    turned = np.flatnonzero((closing[1:] != closing[:-1]).any(axis=1)) + 1
    return np.union1d(turned, [len(episode.timesteps) - 1])


def nearness(frames: Array, goals: Array) -> np.ndarray:
    """How near each frame is to the next sub-goal, [F], from 0 where it is furthest on the way
    there to 1: one minus the squared pixel error as a share of the largest.

    Args:
        frames: [F, ...], pixels of any shape.
        goals: indices of sub-goals, increasing, the last one F − 1.
    """
    frames = np.asarray(frames, np.float32).reshape(len(frames), -1)
    near, start = np.ones(len(frames), np.float32), 0
    for goal in goals:
        error = np.square(frames[start : goal + 1] - frames[goal]).mean(axis=1)
        near[start : goal + 1] = 1.0 - error / max(error.max(), 1e-6)
        start = goal
    return near


def smoothness(actions: Array) -> np.ndarray:
    """Minus the mean square of the change from one action to the next, [F], of normalised chunks
    [F, k, A]."""
    return -np.square(np.diff(actions, axis=1)).mean(axis=(1, 2))


def returns_to_go(dense: Array, timesteps: Array, success: bool) -> np.ndarray:
    """What is still to come at each frame, [F]: 1 for success, and the dense reward [F] as its mean
    over the steps that are left. As a sum it would praise whoever takes longer."""
    steps = np.append(np.diff(timesteps), 1).astype(np.float32)
    left = np.cumsum(steps[::-1])[::-1]
    return np.cumsum((dense * steps)[::-1])[::-1] / left + float(success)


def episode_returns(
    config: Config, policy: FlowPolicy, episodes: Sequence[Episode]
) -> list[np.ndarray]:
    """`returns_to_go` of every episode's frames. Progress is the share of the sub-goals that a
    typical success of the task has."""
    settings = config.compare.reinbot
    goals = [sub_goals(config, episode) for episode in episodes]
    typical = {}
    for task in {episode.task_id for episode in episodes}:
        mine = [(len(g), e.success) for g, e in zip(goals, episodes) if e.task_id == task]
        typical[task] = np.median([n for n, success in mine if success] or [n for n, _ in mine])
    found = []
    for own, episode in zip(goals, episodes):
        near = np.mean([nearness(x, own) for x in episode.images.values()], axis=0)
        behind = np.searchsorted(own, np.arange(len(near)), side="right")
        progress = np.minimum(1.0, behind / typical[episode.task_id])
        chunks = np.asarray(flat_actions(policy, episode.actions)).reshape(episode.actions.shape)
        dense = (
            settings.nearness * near
            + settings.progress * progress
            + settings.smoothness * smoothness(chunks)
        )
        found.append(returns_to_go(dense, episode.timesteps, bool(episode.success)))
    return found


def ranks(returns: Sequence[Array]) -> list[np.ndarray]:
    """Each return's rank among all, from 0 to 1, by episode; equal ones share the lowest."""
    ordered = np.sort(np.concatenate(returns))
    scale = max(1, len(ordered) - 1)
    return [(np.searchsorted(ordered, x) / scale).astype(np.float32) for x in returns]


class Expected:
    """The network that predicts what rank to ask for, from the fine-tuned policy's features."""

    def __init__(self, features: int, width: int):
        self.features, self.width = features, width

    def init(self, key: Array) -> Params:
        """Random {"layers"}, and the "scale" of features that are standardised already."""
        sizes = (self.features, self.width, self.width, 1)
        return {
            "layers": ensemble.init(key, sizes, 1),
            "scale": ensemble.neutral_scale(self.features),
        }


def expected_quality(params: Params, features: Array) -> Array:
    """The rank [B] to ask for at features [B, D]."""
    inputs = ensemble.standard(features, params["scale"])
    return jnp.clip(ensemble.apply(params["layers"], inputs)[0, :, 0], 0.0, 1.0)


def fit_expected(
    features: Array,
    quality: Array,
    key: Array,
    *,
    width: int,
    expectile: float,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> Params:
    """`Expected` parameters after regression to an upper expectile of the ranks [N] behind features
    [N, D]: the best that such states led to."""
    init_key, train_key = jax.random.split(key)
    params = Expected(features.shape[1], width).init(init_key)
    scale = ensemble.scale_of(features)
    inputs = ensemble.standard(jnp.asarray(features), scale)
    quality = jnp.asarray(quality)

    def loss(layers, key):
        rows = jax.random.randint(key, (batch_size,), 0, len(inputs))
        predicted = ensemble.apply(layers, inputs[rows])[0, :, 0]
        return expectile_loss(quality[rows] - predicted, expectile).mean()

    layers = ensemble.train(
        loss, params["layers"], train_key, steps=steps, learning_rate=learning_rate
    )
    return {"layers": layers, "scale": scale}


def conditioned(config: Config) -> Config:
    """The config of the policy that reads the rank."""
    config = ml_collections.ConfigDict(config.to_dict())
    config.policy.advantage_conditioned = True
    config.policy.quality_levels = config.compare.reinbot.levels
    config.policy.condition_dropout = 0.0
    return config.lock()


def actor(workspace: Workspace) -> tuple[Act, Params]:
    """The acting function, which asks for what the fine-tuned policy's features promise."""
    config = workspace.config
    sft, improve = workspace.directory("sft"), workspace.directory("improve")
    judge, judge_params = load_policy(config, sft, sft / "policy")
    policy, params = load_policy(conditioned(config), sft, improve / "policy")
    network = Expected(judge.config.language.width, config.compare.reinbot.width)
    expected = load_params(improve / "expected", abstract_params(network))

    def act(params: Params, observation: Observation, key: Array) -> Array:
        features = judge.encode(params["judge"], observation).features
        quality = expected_quality(params["expected"], features)
        return policy.act(params["policy"], observation, key, quality)

    return act, {"policy": params, "judge": judge_params, "expected": expected}
