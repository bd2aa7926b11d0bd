"""IDQL (arXiv 2304.10573) on action chunks: Q and V by implicit Q-learning (arXiv 2110.06169) from
recorded chunks alone, and acting on that of several chunks of the fine-tuned policy whose Q is
highest. The policy stays as it is; Q and V read its features. No world model is used.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from experiments.compare import ensemble
from experiments.compare.recorded import Chunks, fine_tuned, flat_actions, recorded_chunks
from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.mbpo import chunk_discount
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.stages.acting import Act, exploring
from mbpo_jax.stages.build import Config, abstract_params, load_policy, observation_builder
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.types import Array, Observation, Params


def train(workspace: Workspace, directory: Path) -> dict:
    """Fits Q and V on demonstrations and rollouts; writes `q/`."""
    config = workspace.config
    policy, params = fine_tuned(workspace)
    episodes = [
        episode
        for stage in ("demonstrations", "rollouts")
        for episode in read_episodes(workspace.directory(stage) / "dataset")
    ]
    chunks = recorded_chunks(policy, params, episodes, observation_builder(config))
    discount, weight = chunk_discount(config.rl.discount, config.chunk, config.rl.discount_per)
    chunks = chunks.replace(reward=weight * chunks.reward)
    key = jax.random.key(stream(config.seed, "offline_critics"))
    fit = jax.jit(partial(fit_q, discount=discount, **config.compare.idql))
    save_params(directory / "q", fit(chunks, key))
    return {"chunks": len(chunks.reward)}


def expectile_loss(difference: Array, expectile: float) -> Array:
    """|τ − 1(u < 0)| u² elementwise, of u = target − prediction (arXiv 2110.06169, equation 4)."""
    return jnp.where(difference < 0, 1.0 - expectile, expectile) * jnp.square(difference)


def q_target(reward: Array, done: Array, next_value: Array, discount: float) -> Array:
    """r + γ (1 − done) V(s'), γ per chunk (arXiv 2110.06169, equation 6)."""
    return reward + discount * (1.0 - done) * next_value


@dataclass(frozen=True)
class Critics:
    """Two Q and a V of so many features and flat actions, with two hidden layers of a width."""

    features: int
    actions: int
    width: int

    def init(self, key: Array) -> Params:
        """Random {"q", "v"}, and the "scale" of features that are standardised already."""
        q_key, v_key = jax.random.split(key)
        hidden = self.width, self.width
        return {
            "q": ensemble.init(q_key, (self.features + self.actions, *hidden, 1), 2),
            "v": ensemble.init(v_key, (self.features, *hidden, 1), 1),
            "scale": ensemble.neutral_scale(self.features),
        }


def q_value(params: Params, features: Array, actions: Array) -> Array:
    """The smaller of two Q, [B], of features [B, D] and flat chunks [B, k A]."""
    inputs = jnp.concatenate([ensemble.standard(features, params["scale"]), actions], axis=1)
    return ensemble.apply(params["q"], inputs)[..., 0].min(axis=0)


def fit_q(
    chunks: Chunks,
    key: Array,
    *,
    steps: int,
    width: int,
    expectile: float,
    target_rate: float,
    discount: float,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
) -> Params:
    """{"q", "v", "scale"} after so many steps: V towards an expectile of the target of Q, Q towards
    `q_target`."""
    init_key, train_key = jax.random.split(key)
    params = Critics(chunks.features.shape[1], chunks.actions.shape[1], width).init(init_key)
    params["scale"] = ensemble.scale_of(chunks.features)
    now, later = (
        ensemble.standard(x, params["scale"]) for x in (chunks.features, chunks.next_features)
    )
    inputs = jnp.concatenate([now, chunks.actions], axis=1)
    tx = optax.adam(learning_rate)

    def loss(nets, target, rows):
        value = ensemble.apply(nets["v"], now[rows])[0, :, 0]
        wanted = ensemble.apply(target, inputs[rows])[..., 0].min(axis=0)
        next_value = ensemble.apply(nets["v"], later[rows])[0, :, 0]
        aim = q_target(chunks.reward[rows], chunks.done[rows], next_value, discount)
        error = ensemble.apply(nets["q"], inputs[rows])[..., 0] - jax.lax.stop_gradient(aim)
        return expectile_loss(wanted - value, expectile).mean() + jnp.square(error).mean()

    def step(carry, i):
        nets, target, state = carry
        step_key = jax.random.fold_in(train_key, i)
        rows = jax.random.randint(step_key, (batch_size,), 0, len(inputs))
        updates, state = tx.update(jax.grad(loss)(nets, target, rows), state, nets)
        nets = optax.apply_updates(nets, updates)
        target = optax.incremental_update(nets["q"], target, target_rate)
        return (nets, target, state), None

    nets = {"q": params["q"], "v": params["v"]}
    carry = nets, nets["q"], tx.init(nets)
    (nets, _, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))
    return params | nets


def actor(workspace: Workspace) -> tuple[Act, Params]:
    """The acting function and its parameters."""
    config = workspace.config
    sft = workspace.directory("sft")
    policy, params = load_policy(config, sft, sft / "policy")
    critics = Critics(
        policy.config.language.width,
        policy.config.chunk * policy.env_action_dim,
        config.compare.idql.width,
    )
    q = load_params(workspace.directory("improve") / "q", abstract_params(critics))
    return best_by_q(config, policy), {"policy": params, "q": q}


def best_by_q(config: Config, policy: FlowPolicy) -> Act:
    """`(params, observation [1], key) -> actions [1, k, A]`: of the chunk that `policy.act` gives
    and of others that are drawn as those of the rollouts were, the one with the highest Q."""
    count = config.compare.best_of.chunks_to_choose_from
    behaviour = exploring(policy, config.rollouts.noise_std)

    def act(params: Params, observation: Observation, key: Array) -> Array:
        first = policy.act(params["policy"], observation, key)
        keys = jnp.stack([jax.random.fold_in(key, i) for i in range(1, count)])
        others = jax.vmap(lambda k: behaviour(params["policy"], observation, k)[0])(keys)
        samples = jnp.concatenate([first, others])
        features = policy.encode(params["policy"], observation).features
        q = q_value(params["q"], features.repeat(count, axis=0), flat_actions(policy, samples))
        return samples[jnp.argmax(q)][None]

    return act
