"""RECAP (π*0.6, arXiv 2511.14759): each recorded chunk is labelled by whether it gained time by a
value function, the policy learns all chunks with their labels, and acts on the good label.

A state's return is minus the steps that its episode still took, and a penalty where it failed.
"""

from pathlib import Path

import jax
import ml_collections
import numpy as np

from experiments.compare.imitation import continue_sft
from experiments.compare.recorded import fine_tuned, frame_features
from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.pipelines import Source, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.policy import critic
from mbpo_jax.seeds import stream
from mbpo_jax.stages.acting import Act
from mbpo_jax.stages.build import Config, load_policy, observation_builder
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.types import Array, Demonstration, Params


def train(workspace: Workspace, directory: Path) -> dict:
    """Demonstrations, all of them good, and all rollouts, in one pool; writes `policy/`."""
    config, settings = workspace.config, workspace.config.compare.recap
    policy, params = fine_tuned(workspace)
    builder = observation_builder(config)
    shown, rollouts = (
        read_episodes(workspace.directory(stage) / "dataset")
        for stage in ("demonstrations", "rollouts")
    )
    episodes = [*shown, *rollouts]
    features = frame_features(policy, params, episodes, builder)
    returns = [
        progress_returns(e.length - e.timesteps, bool(e.success), *_limits(config))
        for e in episodes
    ]
    fit = jax.jit(critic.fit_critic, static_argnames="steps")
    layers = fit(
        params["critic"],
        np.concatenate(features),
        np.concatenate(returns),
        jax.random.key(stream(config.seed, "progress")),
        steps=settings.value_steps,
    )
    values = [np.asarray(critic.apply(layers, x).mean(axis=0)) for x in features]
    index = transitions(episodes, builder, config.chunk).index
    advantage = np.array([chunk_advantage(returns[e], values[e], f, g) for e, f, g in index])
    by_task = np.array([episodes[e].task_id for e, *_ in index])
    recorded = index[:, 0] >= len(shown)
    good = labels(advantage, by_task, recorded, settings.positive_share)
    source = labelled(episodes, builder, index[:, :2], good)
    learner, _ = fine_tuned(workspace, conditioned(config))
    continue_sft(workspace, directory, learner, params, [source])
    return {"chunks": len(index), "rollout_chunks_labelled_good": int(good[recorded].sum())}


def _limits(config: Config) -> tuple[int, float]:
    return config.max_steps, config.compare.recap.failure_penalty


def progress_returns(
    steps_left: Array, success: bool, max_steps: int, failure_penalty: float
) -> np.ndarray:
    """Returns [F] of −1 per step, and −`failure_penalty` · `max_steps` at the end of a failure,
    divided by what the worst episode has, so that they lie in [−1, 0].

    Args:
        steps_left: int [F], environment steps until the episode's end.
    """
    lost = np.asarray(steps_left, np.float32) + (0.0 if success else failure_penalty * max_steps)
    return -lost / (max_steps * (1.0 + failure_penalty))


def chunk_advantage(returns: Array, value: Array, before: int, after: int) -> float:
    """What the frames `before` and `after` a chunk, of one episode, say of it: the reward in
    between, plus the value after it (at the episode's end what was really lost), minus the value
    before it (arXiv 2511.14759, section IV-B, with the chunk as lookahead)."""
    earned = returns[before] - returns[after]
    later = returns[after] if after == len(returns) - 1 else value[after]
    return float(earned + later - value[before])


def labels(advantage: Array, task: Array, recorded: Array, positive_share: float) -> np.ndarray:
    """Whether each of N chunks is a good one, bool [N]: of the recorded ones of each task the
    `positive_share` with the largest advantage, and all others, which were demonstrated."""
    good = ~recorded
    for number in np.unique(task[recorded]):
        mine = recorded & (task == number)
        good[mine] = advantage[mine] > np.quantile(advantage[mine], 1.0 - positive_share)
    return good


def labelled(episodes: list[Episode], builder, index: Array, good: Array) -> Source:
    """`Demonstration`s of the chunks at `index` int [N, 2] (episode, frame), with their labels."""

    def record(e, f, label):
        episode = episodes[e]
        return Demonstration(builder.at(episode, f), episode.target_actions[f], np.float32(label))

    return Source(record, np.column_stack([index, good]))


def conditioned(config: Config) -> Config:
    """The config of the policy that reads the label."""
    config = ml_collections.ConfigDict(config.to_dict())
    settings = config.compare.recap
    config.policy.advantage_conditioned = True
    config.policy.condition_dropout = settings.condition_dropout
    config.policy.guidance = settings.guidance
    return config.lock()


def actor(workspace: Workspace) -> tuple[Act, Params]:
    """The acting function, guided towards the good label, and its parameters."""
    config = conditioned(workspace.config)
    policy, params = load_policy(
        config, workspace.directory("sft"), workspace.directory("improve") / "policy"
    )
    return policy.act, params
