"""Recorded episodes as arrays for small networks: the fine-tuned policy's features, its chunks."""

import jax
import numpy as np
from flax import struct

from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import ObservationBuilder, collate, equal_parts, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.nn.normalization import normalize
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.stages.build import Config, abstract_params, build_policy
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.checkpoints import load_params
from mbpo_jax.training.sharding import make_mesh
from mbpo_jax.types import Array, Params

_BATCH = 64


def fine_tuned(workspace: Workspace, config: Config | None = None) -> tuple[FlowPolicy, Params]:
    """The policy that all methods start from, as `config` (by default the run's) describes it, and
    its parameters {"actor", "critic"}."""
    config, sft = config or workspace.config, workspace.directory("sft")
    policy = build_policy(config, read_norm_stats(sft / "norm_stats.json"))
    return policy, load_params(sft / "policy", placed(config, policy))


def placed(config: Config, model) -> Params:
    """`abstract_params` of a policy or world model, split over devices as the config says."""
    return abstract_params(model, make_mesh(config.parallel.fsdp), config.parallel.rules)


def frame_features(
    policy: FlowPolicy, params: Params, episodes: list[Episode], builder: ObservationBuilder
) -> list[np.ndarray]:
    """The policy's features of every frame, float32 [F, D] for each episode."""
    params = jax.jit(policy.for_inference)(params)
    features = jax.jit(lambda params, seen: policy.encode(params, seen).features)
    places = [(e, f) for e, episode in enumerate(episodes) for f in range(len(episode.timesteps))]
    found = []
    for rows in equal_parts(len(places), _BATCH):
        seen = collate([builder.at(episodes[e], f) for e, f in (places[i] for i in rows)])
        found.append(np.asarray(features(params, seen)))
    ends = np.cumsum([len(episode.timesteps) for episode in episodes])
    return np.split(np.concatenate(found)[: len(places)], ends[:-1])


@struct.dataclass
class Chunks:
    """N recorded chunks: `features` float32 [N, D] before and `next_features` after them,
    `actions` float32 [N, k A] normalised; `reward` and `done` float32 [N], 1 where the episode
    succeeded with the chunk, and where it ended with it, by time too. `index` int [N, 3]: episode,
    frame before, frame after."""

    features: Array
    actions: Array
    next_features: Array
    reward: Array
    done: Array
    index: Array


def recorded_chunks(
    policy: FlowPolicy, params: Params, episodes: list[Episode], builder: ObservationBuilder
) -> Chunks:
    """The chunks of some episodes (`pipelines.transitions`)."""
    features = frame_features(policy, params, episodes, builder)
    index = transitions(episodes, builder, policy.config.chunk).index
    last = np.array([f == len(episodes[e].timesteps) - 1 for e, _, f in index], bool)
    success = np.array([bool(episodes[e].success) for e, *_ in index], bool)
    actions = np.stack([episodes[e].actions[f] for e, f, _ in index])
    return Chunks(
        features=np.stack([features[e][f] for e, f, _ in index]),
        actions=flat_actions(policy, actions),
        next_features=np.stack([features[e][f] for e, _, f in index]),
        reward=(last & success).astype(np.float32),
        done=last.astype(np.float32),
        index=index,
    )


def flat_actions(policy: FlowPolicy, actions: Array) -> Array:
    """Chunks [*B, k, A] in the policy's units, flat: [*B, k A]."""
    x = normalize(actions, policy.action_stats, policy.config.normalization)
    return x.reshape(*x.shape[:-2], -1)
