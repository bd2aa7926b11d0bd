"""The value function: an ensemble of MLPs on the pooled prefix features."""

import itertools

import jax
import jax.numpy as jnp

from mbpo_jax.nn.layers import dense
from mbpo_jax.policy.config import CriticConfig


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
