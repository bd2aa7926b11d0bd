"""Policy optimisation against a pessimistic reward: MOPO (arXiv 2005.13239) and MOBILE (Sun et al.,
"Model-Bellman Inconsistency for Penalized Offline Model-Based Reinforcement Learning", ICML 2023).

Both ask how far several models of the dynamics disagree. There is one UMM-World, and with composed
pictures its samples do not differ; so the models are small networks, the members, that predict the
fine-tuned policy's features one chunk ahead, each trained on its own bootstrap sample of the same
chunks as the world model. Branches are still UMM-World's. The members judge the policy's own
observations in them, and a penalty is subtracted from the reward of each chunk.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.compare import ensemble
from experiments.compare.recorded import (
    Chunks,
    fine_tuned,
    flat_actions,
    placed,
    recorded_chunks,
)
from mbpo_jax.mbpo import MBPO, chunk_discount
from mbpo_jax.policy import critic
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import observation_builder
from mbpo_jax.stages.finetune_world_model import world_model_episodes
from mbpo_jax.stages.improve_policy import improve_policy
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import load_params
from mbpo_jax.types import Array, Branch, Observation, Params

Penalty = Callable[[Observation, Array], Array]  # observations [n, M], chunks [n, M, k, A]: [n, M]

_ROWS = 64  # observations that are encoded at a time


def mopo(workspace: Workspace, directory: Path) -> dict:
    """Policy optimisation with `mopo_penalty`; writes `policy/`."""
    members = members_of(workspace)
    deviation = jax.device_get(members["scales"]["features"]["std"])

    def measure(predicted):
        return mopo_penalty(predicted / deviation)

    return _improve(workspace, directory, members, measure, workspace.config.compare.mopo.beta)


def mobile(workspace: Workspace, directory: Path) -> dict:
    """Policy optimisation with `mobile_penalty`, by the value of the stage `value` as it was
    fitted; writes `policy/`.

    Raises:
        StageError: that value was not fitted and is 0 everywhere.
    """
    config = workspace.config
    if not config.value.steps:
        raise StageError(
            "mobile compares values after predicted features, and value.steps = 0 leaves the value "
            "at 0: fit it (--config.value.steps=2000)"
        )
    policy, _ = fine_tuned(workspace)
    path = workspace.directory("value") / "critic"
    layers = jax.device_get(load_params(path, placed(config, policy)["critic"]))
    discount, _ = chunk_discount(config.rl.discount, config.chunk, config.rl.discount_per)

    def measure(predicted):
        values = jax.vmap(lambda features: critic.apply(layers, features).min(axis=0))(predicted)
        return mobile_penalty(values, discount)

    members = members_of(workspace)
    return _improve(workspace, directory, members, measure, config.compare.mobile.beta)


def mopo_penalty(predicted: Array) -> Array:
    """Root mean square over features of the members' deviation, [B], of predictions [E, B, D] in
    units of the features' deviation in the data ("ensemble standard deviation" of arXiv
    2110.04135; MOPO itself takes the largest variance that a member predicts)."""
    return jnp.sqrt(predicted.var(axis=0).mean(-1))


def mobile_penalty(values: Array, discount: float) -> Array:
    """γ^k times the deviation [B] of the values [E, B] after the members' predictions: what they
    disagree about in the Bellman target r + γ^k V(s')."""
    return discount * values.std(axis=0)


class PenalisedMBPO(MBPO):
    """`MBPO` whose advantages and returns are those of reward − β · penalty in every chunk that
    counts. The reward of a branch stays as it was: values are recomputed later, and the penalty is
    then subtracted once more from the same."""

    def __init__(self, *arguments, penalty: Penalty, beta: float):
        super().__init__(*arguments)
        self._penalty, self._beta = penalty, beta

    def with_advantages(self, branch: Branch) -> Branch:
        penalty = self._penalty(branch.observation, branch.actions)
        reward = branch.reward - self._beta * branch.mask * penalty
        done = super().with_advantages(branch.replace(reward=reward))
        return done.replace(reward=branch.reward)


def fit_members(
    chunks: Chunks, key: Array, *, members: int, width: int, steps: int, batch_size: int = 128
) -> Params:
    """Members that predict the change of features over a chunk, each from its bootstrap sample."""
    inputs = jnp.concatenate([chunks.features, chunks.actions], axis=1)
    change = jnp.asarray(chunks.next_features - chunks.features)
    scales = {
        "inputs": ensemble.scale_of(inputs),
        "change": ensemble.scale_of(change),
        "features": ensemble.scale_of(jnp.asarray(chunks.features)),
    }
    x = ensemble.standard(inputs, scales["inputs"])
    y = ensemble.standard(change, scales["change"])
    init_key, sample_key, train_key = jax.random.split(key, 3)
    layers = ensemble.init(init_key, (x.shape[1], width, width, y.shape[1]), members)
    own = jax.random.randint(sample_key, (members, len(x)), 0, len(x))  # the bootstrap samples

    def loss(layers, key):
        drawn = jax.random.randint(key, (members, batch_size), 0, len(x))
        rows = jnp.take_along_axis(own, drawn, axis=1)
        return jnp.square(ensemble.apply(layers, x[rows]) - y[rows]).mean()

    layers = ensemble.train(loss, layers, train_key, steps=steps, learning_rate=1e-3)
    return {"layers": layers, "scales": scales}


def predict(members: Params, features: Array, actions: Array) -> Array:
    """Features [E, B, D] a chunk after features [B, D] and flat normalised chunks [B, k A]."""
    scales = members["scales"]
    inputs = jnp.concatenate([features, actions], axis=1)
    change = ensemble.apply(members["layers"], ensemble.standard(inputs, scales["inputs"]))
    return features + change * scales["change"]["std"] + scales["change"]["mean"]


def members_of(workspace: Workspace) -> Params:
    """`fit_members` on the chunks of the world model's training episodes."""
    config = workspace.config
    policy, params = fine_tuned(workspace)
    episodes, _ = world_model_episodes(workspace)
    chunks = recorded_chunks(policy, params, episodes, observation_builder(config))
    key = jax.random.key(stream(config.seed, "dynamics_members"))
    return jax.jit(partial(fit_members, **config.compare.dynamics))(chunks, key)


def _improve(
    workspace: Workspace,
    directory: Path,
    members: Params,
    measure: Callable[[Array], Array],
    beta: float,
) -> dict:
    """`improve_policy` with the penalty `measure(predictions [E, B, D]) -> [B]`. The fine-tuned
    policy is in memory a second time."""
    policy, params = fine_tuned(workspace)
    # On the host, so that they are constants of the program: it runs within a part of the devices.
    stored = jax.device_get((jax.jit(policy.for_inference)(params), members))

    def penalty(observation, actions):
        params, members = jax.tree.map(jnp.asarray, stored)

        def one(row):
            observation, actions = jax.tree.map(lambda x: x[None], row)
            features = policy.encode(params, observation).features
            return measure(predict(members, features, flat_actions(policy, actions)))[0]

        shape = actions.shape[:2]
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (observation, actions))
        return jax.lax.map(one, rows, batch_size=_ROWS).reshape(shape)

    return improve_policy(workspace, directory, partial(PenalisedMBPO, penalty=penalty, beta=beta))
