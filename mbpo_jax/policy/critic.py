"""The value function: an ensemble of MLPs on the pooled prefix features.

Before the first update it is fitted to what recorded episodes returned: a short branch is worth
what its last state is worth, and a critic that starts at zero and learns from imagination alone
knows that too late.
"""

import itertools

import jax
import jax.numpy as jnp
import optax

from mbpo_jax.nn.layers import dense
from mbpo_jax.policy.config import CriticConfig
from mbpo_jax.shapes import Array, Float
from mbpo_jax.types import Params


def init(key: jax.Array, input_dim: int, config: CriticConfig) -> list[dict]:
    """One {"kernel" [E, in, out], "bias" [E, out]} per layer, E members. The last layer starts at
    zero, so every value does."""
    sizes = (input_dim, *config.widths, 1)
    layers = []
    for fan_in, out in itertools.pairwise(sizes):
        key, layer_key = jax.random.split(key)
        layers.append(dense(layer_key, fan_in, out, (config.ensemble,)))
    layers[-1]["kernel"] = jnp.zeros_like(layers[-1]["kernel"])
    return layers


def apply(layers: list[dict], features: jax.Array) -> jax.Array:
    """Values [E, B] of features [B, D]; no gradient reaches the features."""
    x = jax.lax.stop_gradient(features)[None]
    for index, weights in enumerate(layers):
        x = x @ weights["kernel"] + weights["bias"][:, None]
        if index < len(layers) - 1:
            x = jax.nn.relu(x)
    return x[..., 0]


def fit_critic(
    layers: Params,
    features: Float[Array, "n d"],
    returns: Float[Array, " n"],
    key: Array,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 128,
    feature_noise: float = 0.3,
) -> Params:
    """A fresh critic (`init`) after AdamW steps on the squared error to `returns`.

    Features are standardised for the fit, and the first layer then takes that over, so that the
    critic reads raw ones. Noise on the standardised features keeps it from learning episodes by
    heart.
    """
    features, returns = jnp.asarray(features), jnp.asarray(returns)
    mean, std = features.mean(0), features.std(0) + 1e-6
    standard = (features - mean) / std
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)

    def loss(layers, x, y):
        return jnp.square(apply(layers, x) - y).mean()

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
