"""Several small networks of the same shape, side by side."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from mbpo_jax.nn.layers import dense
from mbpo_jax.types import Array, Params


def init(key: Array, sizes: Sequence[int], members: int) -> list[dict]:
    """Layers of `members` networks with the given sizes, from input to output."""
    pairs = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(pairs))
    return [dense(k, fan_in, out, (members,)) for k, (fan_in, out) in zip(keys, pairs)]


def apply(layers: list[dict], x: Array) -> Array:
    """Outputs [E, B, out] of inputs [B, in], or of each member's own [E, B, in]."""
    for i, weights in enumerate(layers):
        x = x @ weights["kernel"] + weights["bias"][:, None]
        if i < len(layers) - 1:
            x = jax.nn.relu(x)
    return x


def scale_of(x: Array) -> dict[str, Array]:
    """Mean and deviation of each column of x [N, D]; `standard` takes both away."""
    return {"mean": jnp.mean(x, 0), "std": jnp.std(x, 0) + 1e-6}


def neutral_scale(columns: int) -> dict[str, Array]:
    """The scale by which `standard` changes nothing."""
    return {"mean": jnp.zeros(columns), "std": jnp.ones(columns)}


def standard(x: Array, scale: dict[str, Array]) -> Array:
    """x [*B, D] with zero mean and unit deviation in the data that `scale_of` saw."""
    return (x - scale["mean"]) / scale["std"]


def train(
    loss: Callable[[Params, Array], Array],
    params: Params,
    key: Array,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
) -> Params:
    """`params` after AdamW steps on `loss(params, key)`, which draws its batch by the key."""
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)

    def step(carry, i):
        params, state = carry
        gradient = jax.grad(loss)(params, jax.random.fold_in(key, i))
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return params
