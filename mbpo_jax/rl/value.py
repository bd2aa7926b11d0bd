"""The critic before the first update: regression to what episodes returned.

A short branch is worth what its last state is worth. A critic that starts at zero and learns from
imagination alone knows that too late; the recorded episodes know it from the start.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mbpo_jax.policy import critic
from mbpo_jax.types import Params


def chunk_returns(
    steps_left: Array, success: Array, chunk: int, discount: float, reward_weight: float
) -> Float[Array, "n"]:
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


def fit_critic(
    layers: Params,
    features: Float[Array, "n d"],
    returns: Float[Array, "n"],
    key: Array,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 128,
    feature_noise: float = 0.3,
) -> Params:
    """A fresh critic (`policy.critic`) after AdamW steps on the squared error to `returns`.

    Features are standardised for the fit, and the first layer then takes that over, so that the
    critic reads raw ones. Noise on the standardised features keeps it from learning episodes by
    heart.
    """
    features, returns = jnp.asarray(features), jnp.asarray(returns)
    mean, std = features.mean(0), features.std(0) + 1e-6
    standard = (features - mean) / std
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)

    def loss(layers, x, y):
        return jnp.square(critic.apply(layers, x) - y).mean()

    def step(carry, i):
        layers, opt_state = carry
        row_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.randint(row_key, (batch_size,), 0, len(returns))
        noise = feature_noise * jax.random.normal(noise_key, (batch_size, features.shape[1]))
        gradient = jax.grad(loss)(layers, standard[rows] + noise, returns[rows])
        updates, opt_state = tx.update(gradient, opt_state, layers)
        return (optax.apply_updates(layers, updates), opt_state), None

    (fitted, _), _ = jax.lax.scan(step, (layers, tx.init(layers)), jnp.arange(steps))
    first, *rest = fitted
    kernel = first["kernel"] / std[:, None]
    return [{"kernel": kernel, "bias": first["bias"] - mean @ kernel}, *rest]


def auc(score: Array, label: Array) -> float:
    """Area under the ROC curve: how often a positive scores above a negative (ties count half);
    NaN without both kinds."""
    score, label = jnp.asarray(score), jnp.asarray(label) > 0.5
    positive, negative = score[label], score[~label]
    if not len(positive) or not len(negative):
        return float("nan")
    above = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    return float(above)
