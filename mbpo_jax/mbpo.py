"""VLA-MBPO on one page: policy optimisation on short branches that a world model imagines
(arXiv 2603.20607). One iteration is

    branch = imagine(policy, world, params, world_params, start, keys, chunks=2, ...)  # section 4.3
    branch = mbpo.with_advantages(branch)                        # equation 4, GAE over chunks
    state, metrics = mbpo.update(state, minibatch(branch))       # clipped surrogate, value loss

with a fresh branch every few updates. Everything here is a pure function of arrays: there is no
mesh, no checkpoint and no logger. `stages/optimize_policy.py` runs it on devices, and
`python -m experiments.toy` in seconds on a world whose optimum is known.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mbpo_jax.gradients import join_rows, summed_value_and_grad
from mbpo_jax.shapes import Array, Float
from mbpo_jax.types import Branch, Demonstration, Observation, Params, Policy, WorldModel


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; the defaults are the paper's on LIBERO-Long."""

    branch_chunks: int = 2  # n, action chunks of a branch
    group_size: int = 1  # branches from one start state, compared with each other
    reward_threshold: float = 0.5  # P(done) from which the reward is 1; 0: P(done) is the reward
    discount: float = 0.99  # γ
    discount_per: str = "paper"  # γ per step (γ^k per chunk), or "reference": γ per chunk
    gae_lambda: float = 0.95  # λ, per chunk
    normalize_advantages: bool = True
    exchange_advantages: bool = False  # a control: each group has its neighbour's
    clip_ratio: float = 0.1  # ε of the surrogate
    dual_clip: float = 0.0  # above 1: ratio beyond which a bad chunk no longer counts more
    value_clip: float = 0.5
    huber_delta: float = 10.0
    anchor_weight: float = 0.0  # of the flow-matching loss on demonstrations
    actor_lr: float = 5e-6
    critic_lr: float = 1e-4
    weight_decay: float = 1e-4
    grad_clip: float = 1.0  # global norm, each network on its own
    critic_warmup: int = 50  # updates that leave the actor as it is
    gradient_accumulation: int = 4  # slices of a minibatch, one after the other


@struct.dataclass
class State:
    """Policy parameters {"actor", "critic"} with an optimiser state each; `step` counts updates."""

    params: Params
    actor_opt: Any
    critic_opt: Any
    step: Array


def imagine(
    policy: Policy,
    world: WorldModel,
    params: Params,
    world_params: Params,
    start: Observation,
    keys: Array,
    precomputed: Any = None,
    *,
    chunks: int,
    reward_threshold: float,
    reward_weight: float = 1.0,
) -> Branch:
    """Rolls the policy `chunks` action chunks forward inside the world model (section 4.3).

    A branch ends at its first success; what follows is computed and masked. Each branch is a
    function of its own start state and key, so that how branches are grouped, or spread over
    devices, does not matter. With `reward_threshold` 0 a branch goes on with the weight of its not
    having ended: `done` and `mask` are probabilities then.

    Args:
        start: observations of M start states (leading axis [M]).
        keys: random keys [M], one for each branch.
        precomputed: what `WorldModel.precompute` gave for the start states, if it was called.
        chunks: n, the branch length; for full-horizon imagination the episode's.
        reward_weight: what a reward at a chunk's last step counts (`chunk_discount`).

    Returns:
        a `Branch` with leading axes [n, M].
    """

    def branch(start, key, precomputed):
        def chunk_step(carry, chunk_key):
            state, alive = carry
            sample_key, world_key = jax.random.split(chunk_key)
            prefix = policy.encode(params, state.observation)
            sample = policy.sample(params, prefix, sample_key)
            following = world.step(world_params, state, sample.actions, world_key)
            done = world.success_probability(world_params, following).astype(jnp.float32)
            if reward_threshold:
                done = (done > reward_threshold).astype(jnp.float32)
            record = {
                "observation": state.observation,
                "chain": sample.chain,
                "actions": sample.actions,
                "log_prob": sample.log_prob,
                "value": policy.value(params, prefix),
                "reward": reward_weight * done * (alive if reward_threshold else 1.0),
                "done": done,
                "mask": alive,
            }
            return (following, alive * (1.0 - done)), record

        start_key, *chunk_keys = jax.random.split(key, 1 + chunks)
        start, precomputed = jax.tree.map(lambda x: x[None], (start, precomputed))
        state = world.encode(world_params, start, start_key, precomputed)
        carry = state, jnp.ones(1, jnp.float32)
        (state, _), records = jax.lax.scan(chunk_step, carry, jnp.stack(chunk_keys))
        last = state.observation
        bootstrap = policy.value(params, policy.encode(params, last))
        records = jax.tree.map(lambda x: x[:, 0], records)
        return records, jax.tree.map(lambda x: x[0], (last, bootstrap))

    records, (last, bootstrap) = jax.vmap(branch, out_axes=(1, 0))(start, keys, precomputed)
    return Branch(**records, last_observation=last, bootstrap_value=bootstrap)


class MBPO:
    """One policy's optimisation: advantages, losses, update.

    Args:
        chunk: k, environment steps in an action chunk.
        trainable: tree of bools like the actor's parameters, False where the policy stops the
            gradient; None for all True.
    """

    def __init__(
        self, policy: Policy, settings: Settings, chunk: int, trainable: Params | None = None
    ):
        self.policy, self.settings = policy, settings
        self.discount, self.reward_weight = chunk_discount(
            settings.discount, chunk, settings.discount_per
        )
        decay, clip = settings.weight_decay, optax.clip_by_global_norm(settings.grad_clip)
        actor = optax.adamw(settings.actor_lr, weight_decay=decay)
        if trainable is not None:
            actor = optax.masked(actor, trainable)
        self.actor_tx = optax.chain(clip, actor)
        self.critic_tx = optax.chain(clip, optax.adamw(settings.critic_lr, weight_decay=decay))

    def init(self, params: Params) -> State:
        """Fresh optimisers around the given {"actor", "critic"} parameters."""
        return State(
            params=params,
            actor_opt=self.actor_tx.init(params["actor"]),
            critic_opt=self.critic_tx.init(params["critic"]),
            step=jnp.zeros((), jnp.int32),
        )

    def with_advantages(self, branch: Branch) -> Branch:
        """The branch with advantages and returns.

        In groups, the first chunks are compared with each other (`leave_one_out`) instead of with
        the value where they started.
        """
        rl = self.settings
        recorded = branch.reward, branch.value, branch.done, branch.bootstrap_value
        advantage, returns = generalized_advantages(*recorded, self.discount, rl.gae_lambda)
        if rl.group_size > 1:
            advantage = advantage.at[0].set(leave_one_out(returns[0], rl.group_size))
        if rl.exchange_advantages:
            # As large as before, and without a word of what the chunks led to. Exchanged within a
            # group they would tell: leave-one-out of the others falls with one's own return.
            advantage = jnp.roll(advantage, rl.group_size, axis=1)
        return branch.replace(advantage=advantage, returns=returns)

    def outputs(self, params: Params, batch: Branch) -> tuple[Array, Array]:
        """Log-probabilities and values [N] of chunks (`flattened`) under these parameters."""
        prefix = self.policy.encode(params, batch.observation)
        log_prob = self.policy.log_prob(params, prefix, batch.chain)
        return log_prob, self.policy.value(params, prefix)

    def loss(self, log_prob: Array, value: Array, batch: Branch) -> tuple[Array, dict[str, Array]]:
        """Actor loss + critic loss of `outputs`, and metrics. The critic reads stop-gradient
        features, so that the sum's gradient is each network's own."""
        rl, mask, returns = self.settings, batch.mask, batch.returns
        clip = rl.clip_ratio, rl.clip_ratio
        actor, metrics = actor_loss(
            log_prob, batch.log_prob, batch.advantage, mask, clip, rl.dual_clip
        )
        critic = critic_loss(value, batch.value, returns, mask, rl.value_clip, rl.huber_delta)
        error = returns - value
        unexplained = variance(error, mask) / jnp.maximum(variance(returns, mask), 1e-8)
        return actor + critic, metrics | {
            "actor_loss": actor,
            "critic_loss": critic,
            "value_error": jnp.sqrt(masked_mean(jnp.square(error), mask)),
            "explained_variance": 1.0 - unexplained,
            "value": masked_mean(value, mask),
        }

    def update(
        self,
        state: State,
        batch: Branch,
        demonstrations: Demonstration | None = None,
        key: Array | None = None,
    ) -> tuple[State, dict[str, Array]]:
        """One gradient step on one minibatch of chunks. During warm-up the actor stays bit for bit.

        Args:
            demonstrations, key: what the anchor needs, if it has a weight. It holds the actor near
                what it was fine-tuned on (DiWA, arXiv 2508.03645); the paper has none.
        """
        gradient, metrics = self.gradient(state.params, batch)
        if self.settings.anchor_weight:
            pull, anchor = jax.grad(self.policy.loss, has_aux=True)(
                state.params["actor"], demonstrations.observation, demonstrations.actions, key
            )
            gradient["actor"] = jax.tree.map(
                lambda g, p: g + self.settings.anchor_weight * p, gradient["actor"], pull
            )
            metrics["anchor_loss"] = anchor["loss"]
        before = state.params
        actor = _step(self.actor_tx, gradient["actor"], state.actor_opt, before["actor"])
        critic = _step(self.critic_tx, gradient["critic"], state.critic_opt, before["critic"])
        warm = state.step >= self.settings.critic_warmup
        actor = jax.tree.map(
            lambda new, old: jnp.where(warm, new, old), actor, (before["actor"], state.actor_opt)
        )
        metrics |= {
            "actor_grad_norm": optax.tree.norm(gradient["actor"]),
            "critic_grad_norm": optax.tree.norm(gradient["critic"]),
        }
        params = {"actor": actor[0], "critic": critic[0]}
        return State(params, actor[1], critic[1], state.step + 1), metrics

    def gradient(self, params: Params, batch: Branch) -> tuple[Params, dict[str, Array]]:
        """The gradient of `loss` and the metrics, in slices of the batch if so configured."""
        total = jnp.maximum(batch.mask.sum(), 1.0)

        def slice_loss(params, rows, _):
            # A masked mean is the sum of the slices' means, each with its share of the weight.
            outputs = self.outputs(params, rows)
            return self.loss(*outputs, rows)[0] * rows.mask.sum() / total, outputs

        accumulate = summed_value_and_grad(slice_loss, self.settings.gradient_accumulation)
        (_, outputs), gradient = accumulate(params, batch)
        return gradient, self.loss(*join_rows(outputs), batch)[1]


def flattened(branch: Branch, normalize: bool) -> Branch:
    """The chunks [M * n] of a branch [n, M], to learn from. Those of one branch are neighbours, so
    that a batch that is split over devices stays where its branches are.

    Args:
        normalize: whether advantages are normalised over the unmasked chunks.
    """
    if normalize:
        advantage = normalize_advantages(branch.advantage, branch.mask)
        branch = branch.replace(advantage=advantage)
    branch = branch.replace(last_observation=None, bootstrap_value=None)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), branch)


def chunk_discount(discount: float, chunk: int, convention: str) -> tuple[float, float]:
    """Discount per chunk and the weight of a reward earned at the chunk's last step.

    The paper (equation 4) discounts every environment step: a chunk of k steps discounts the future
    by γ^k, and a reward at its last step counts γ^(k-1). The reference implementation discounts
    once per chunk: γ and 1.

    Raises:
        ValueError: a convention that is neither "paper" nor "reference".
    """
    if convention == "paper":
        return discount**chunk, discount ** (chunk - 1)
    if convention == "reference":
        return discount, 1.0
    raise ValueError(f"rl.discount_per is {convention!r}; choose 'paper' or 'reference'")


def generalized_advantages(
    reward: Float[Array, " n *m"],
    value: Float[Array, " n *m"],
    done: Float[Array, " n *m"],
    bootstrap_value: Float[Array, "*m"],
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Array, " n *m"], Float[Array, " n *m"]]:
    """Advantages, and returns = advantages + value (arXiv 1506.02438, eq. 16, on the chunk MDP).

    δ_i = r_i + γ (1 - done_i) V_{i+1} - V_i,  A_i = δ_i + γ λ (1 - done_i) A_{i+1}, where
    V_n is `bootstrap_value` and γ, λ act per chunk. `done_i` cuts the bootstrap after chunk i.
    """
    next_value = jnp.concatenate([value[1:], bootstrap_value[None]])
    continues = 1.0 - done
    delta = reward + discount * continues * next_value - value

    def backward(advantage, step):
        delta_i, continues_i = step
        advantage = delta_i + discount * gae_lambda * continues_i * advantage
        return advantage, advantage

    start = jnp.zeros_like(bootstrap_value)
    _, advantages = jax.lax.scan(backward, start, (delta, continues), reverse=True)
    return advantages, advantages + value


def leave_one_out(returns: Float[Array, " m"], group_size: int) -> Float[Array, " m"]:
    """Each return minus the mean of the others of its group, `group_size` neighbours (RLOO,
    arXiv 2402.14740, eq. 8): what a choice gained over other choices from the same start."""
    grouped = returns.reshape(-1, group_size)
    others = (grouped.sum(1, keepdims=True) - grouped) / (group_size - 1)
    return (grouped - others).reshape(-1)


def masked_mean(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Mean of x over the entries where mask is 1 (0 if there are none)."""
    return (x * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def variance(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Variance of x over the entries where mask is 1."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def normalize_advantages(
    advantage: Float[Array, "*n"], mask: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """Zero mean and unit (unbiased) standard deviation over the entries where mask is 1."""
    count = mask.sum()
    unbiased = variance(advantage, mask) * count / jnp.maximum(count - 1.0, 1.0)
    return (advantage - masked_mean(advantage, mask)) / (jnp.sqrt(unbiased) + 1e-5)


def actor_loss(
    log_prob: Float[Array, "*n"],
    old_log_prob: Float[Array, "*n"],
    advantage: Float[Array, "*n"],
    mask: Float[Array, "*n"],
    clip: tuple[float, float],
    dual_clip: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7), negated to be minimised.

    Args:
        clip: how far below and above 1 a ratio still counts.
        dual_clip: ratio beyond which a negative advantage no longer counts more (arXiv 1912.09729,
            eq. 5): without it one chunk that has become likelier can outweigh all others. 0: none.

    Returns:
        (loss, metrics): `approx_kl` is the mean of (ρ - 1) - log ρ, which is never negative;
        `clip_fraction` the share of ratios outside of that.
    """
    log_ratio = jnp.where(mask > 0, log_prob - old_log_prob, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip[0], 1.0 + clip[1])
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)
    return masked_mean(loss, mask), {
        "approx_kl": masked_mean(ratio - 1.0 - log_ratio, mask),
        "clip_fraction": masked_mean((clipped != ratio).astype(ratio.dtype), mask),
        "ratio": masked_mean(ratio, mask),
    }


def critic_loss(
    value: Float[Array, "*n"],
    old_value: Float[Array, "*n"],
    returns: Float[Array, "*n"],
    mask: Float[Array, "*n"],
    value_clip: float,
    huber_delta: float,
) -> Float[Array, ""]:
    """Clipped Huber value loss: the larger of the losses of V and of V_old + clip(V - V_old)."""
    clipped = old_value + jnp.clip(value - old_value, -value_clip, value_clip)
    loss = jnp.maximum(
        optax.huber_loss(value, returns, delta=huber_delta),
        optax.huber_loss(clipped, returns, delta=huber_delta),
    )
    return masked_mean(loss, mask)


def _step(tx: optax.GradientTransformation, gradient: Params, opt_state: Any, params: Params):
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
