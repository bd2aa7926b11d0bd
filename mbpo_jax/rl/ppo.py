"""Clipped policy optimisation: the two losses and one gradient step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from mbpo_jax.gradients import join_rows, summed_value_and_grad
from mbpo_jax.types import Demonstration, Observation, Params, Policy


@struct.dataclass
class PPOBatch:
    """Chunks to learn from; leading axis [N]. `valid` is 0 for chunks after a branch ended."""

    observation: Observation
    chain: Any
    log_prob: Array
    value: Array
    advantage: Array
    target: Array
    valid: Array


@struct.dataclass
class PPOState:
    """Policy parameters {"actor", "critic"} with an optimiser state each; `step` counts updates."""

    params: Params
    actor_opt: Any
    critic_opt: Any
    step: Array


def masked_mean(x: Float[Array, "*n"], valid: Float[Array, "*n"]) -> Float[Array, ""]:
    """Mean of x over the entries where valid is 1 (0 if there are none)."""
    return (x * valid).sum() / jnp.maximum(valid.sum(), 1.0)


def actor_loss(
    log_prob: Float[Array, "*n"],
    old_log_prob: Float[Array, "*n"],
    advantage: Float[Array, "*n"],
    valid: Float[Array, "*n"],
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7), negated to be minimised.

    Args:
        dual_clip: ratio beyond which a negative advantage no longer counts more (arXiv 1912.09729,
            eq. 5): without it one chunk that has become likelier can outweigh all others. 0: none.

    Returns:
        (loss, metrics): `approx_kl` is the mean of (ρ - 1) - log ρ, which is never negative;
        `clip_fraction` the share of ratios outside [1 - clip_low, 1 + clip_high].
    """
    log_ratio = jnp.where(valid > 0, log_prob - old_log_prob, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)
    outside = (clipped != ratio).astype(ratio.dtype)
    metrics = {
        "approx_kl": masked_mean(ratio - 1.0 - log_ratio, valid),
        "clip_fraction": masked_mean(outside, valid),
        "ratio": masked_mean(ratio, valid),
    }
    return masked_mean(loss, valid), metrics


def critic_loss(
    value: Float[Array, "*n"],
    old_value: Float[Array, "*n"],
    target: Float[Array, "*n"],
    valid: Float[Array, "*n"],
    value_clip: float,
    huber_delta: float,
) -> Float[Array, ""]:
    """Clipped Huber value loss: the larger of the losses of V and of V_old + clip(V - V_old)."""
    clipped = old_value + jnp.clip(value - old_value, -value_clip, value_clip)
    loss = jnp.maximum(
        optax.huber_loss(value, target, delta=huber_delta),
        optax.huber_loss(clipped, target, delta=huber_delta),
    )
    return masked_mean(loss, valid)


def explained_variance(
    value: Float[Array, "*n"], target: Float[Array, "*n"], valid: Float[Array, "*n"]
) -> Float[Array, ""]:
    """1 - Var(target - value) / Var(target) over the valid entries."""

    def variance(x):
        return masked_mean(jnp.square(x - masked_mean(x, valid)), valid)

    return 1.0 - variance(target - value) / jnp.maximum(variance(target), 1e-8)


class PPO:
    """One policy's optimisers and its jittable update.

    Args:
        policy: what to optimise.
        actor_lr, critic_lr: AdamW learning rates; gradients are clipped to `grad_clip` (global
            norm, each network on its own).
        clip_ratio: ε of the surrogate, both signs. dual_clip: see `actor_loss`.
        value_clip, huber_delta: of the critic's loss.
        critic_warmup: updates that leave the actor as it is.
        anchor_weight: of `policy.loss` on demonstrations, which holds the actor near what it was
            fine-tuned on (DiWA, arXiv 2508.03645); 0 for none, as in the paper.
        trainable: tree of bools like the actor's parameters, False where the policy stops the
            gradient; None for all True.
        gradient_accumulation: slices of a minibatch whose gradients are computed one after the
            other; the update is the same.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        actor_lr: float,
        critic_lr: float,
        weight_decay: float,
        grad_clip: float,
        clip_ratio: float,
        value_clip: float,
        huber_delta: float,
        critic_warmup: int,
        dual_clip: float = 0.0,
        anchor_weight: float = 0.0,
        trainable: Params | None = None,
        gradient_accumulation: int = 1,
    ):
        self.policy = policy
        self.gradient_accumulation = gradient_accumulation
        self.clip_ratio, self.value_clip, self.huber_delta = clip_ratio, value_clip, huber_delta
        self.dual_clip = dual_clip
        self.critic_warmup, self.anchor_weight = critic_warmup, anchor_weight

        def clipped(tx):
            return optax.chain(optax.clip_by_global_norm(grad_clip), tx)

        actor = optax.adamw(actor_lr, weight_decay=weight_decay)
        if trainable is not None:
            actor = optax.masked(actor, trainable)
        self.actor_tx = clipped(actor)
        self.critic_tx = clipped(optax.adamw(critic_lr, weight_decay=weight_decay))

    def init(self, params: Params) -> PPOState:
        """A fresh optimiser around the given {"actor", "critic"} parameters."""
        return PPOState(
            params=params,
            actor_opt=self.actor_tx.init(params["actor"]),
            critic_opt=self.critic_tx.init(params["critic"]),
            step=jnp.zeros((), jnp.int32),
        )

    def loss(self, params: Params, batch: PPOBatch) -> tuple[Array, tuple[Array, Array]]:
        """Actor loss + critic loss, and the log-probabilities and values [N] behind them. The
        critic reads stop-gradient features, so that the sum's gradient is each network's own."""
        prefix = self.policy.encode(params, batch.observation)
        log_prob = self.policy.log_prob(params, prefix, batch.chain)
        value = self.policy.value(params, prefix)
        surrogate, _, value_loss = self._losses(log_prob, value, batch)
        return surrogate + value_loss, (log_prob, value)

    def _losses(self, log_prob, value, batch):
        surrogate, metrics = actor_loss(
            log_prob,
            batch.log_prob,
            batch.advantage,
            batch.valid,
            self.clip_ratio,
            self.clip_ratio,
            self.dual_clip,
        )
        value_loss = critic_loss(
            value, batch.value, batch.target, batch.valid, self.value_clip, self.huber_delta
        )
        return surrogate, metrics, value_loss

    def metrics(self, log_prob: Array, value: Array, batch: PPOBatch) -> dict[str, Array]:
        """What is worth watching of the current log-probabilities and values [N] of a batch."""
        surrogate, metrics, value_loss = self._losses(log_prob, value, batch)
        return metrics | {
            "actor_loss": surrogate,
            "critic_loss": value_loss,
            "value_error": jnp.sqrt(masked_mean(jnp.square(value - batch.target), batch.valid)),
            "explained_variance": explained_variance(value, batch.target, batch.valid),
            "value": masked_mean(value, batch.valid),
        }

    def gradient(self, params: Params, batch: PPOBatch) -> tuple[Params, dict[str, Array]]:
        """The gradient of `loss` and the metrics, in slices of the batch if so configured."""

        def slice_loss(params, rows, index):
            # A mean over valid chunks is the sum of the slices' means, each with its share of them.
            share = rows.valid.sum() / jnp.maximum(batch.valid.sum(), 1.0)
            loss, outputs = self.loss(params, rows)
            return loss * share, outputs

        accumulate = summed_value_and_grad(slice_loss, self.gradient_accumulation)
        (_, outputs), gradient = accumulate(params, batch)
        return gradient, self.metrics(*join_rows(outputs), batch)

    def update(
        self,
        state: PPOState,
        batch: PPOBatch,
        demonstrations: Demonstration | None = None,
        key: Array | None = None,
    ) -> tuple[PPOState, dict[str, Array]]:
        """One gradient step on one minibatch. During warm-up the actor stays bit for bit.

        Args:
            demonstrations, key: what the anchor needs, if it has a weight.
        """
        grads, metrics = self.gradient(state.params, batch)
        if self.anchor_weight:
            pull, anchor = jax.grad(self.policy.loss, has_aux=True)(
                state.params["actor"], demonstrations.observation, demonstrations.actions, key
            )
            weight = self.anchor_weight
            grads["actor"] = jax.tree.map(lambda g, p: g + weight * p, grads["actor"], pull)
            metrics["anchor_loss"] = anchor["loss"]
        warm = state.step >= self.critic_warmup
        actor_updates, actor_opt = self.actor_tx.update(
            grads["actor"], state.actor_opt, state.params["actor"]
        )
        critic_updates, critic_opt = self.critic_tx.update(
            grads["critic"], state.critic_opt, state.params["critic"]
        )

        def if_warm(new, old):
            return jax.tree.map(lambda a, b: jnp.where(warm, a, b), new, old)

        actor = optax.apply_updates(state.params["actor"], actor_updates)
        metrics |= {
            "actor_grad_norm": optax.tree.norm(grads["actor"]),
            "critic_grad_norm": optax.tree.norm(grads["critic"]),
        }
        return (
            PPOState(
                params={
                    "actor": if_warm(actor, state.params["actor"]),
                    "critic": optax.apply_updates(state.params["critic"], critic_updates),
                },
                actor_opt=if_warm(actor_opt, state.actor_opt),
                critic_opt=critic_opt,
                step=state.step + 1,
            ),
            metrics,
        )


def gradient_agreement(ppo: PPO, params: Params, one: PPOBatch, other: PPOBatch) -> Array:
    """Cosine between the actor's gradients on two independent batches: how much of a gradient is
    signal. Of one batch that share is about c, of N of them together N c / (1 + (N - 1) c)."""
    gradients = [ppo.gradient(params, batch)[0]["actor"] for batch in (one, other)]
    norms = [optax.tree.norm(gradient) for gradient in gradients]
    return optax.tree.vdot(*gradients) / jnp.maximum(norms[0] * norms[1], 1e-12)
