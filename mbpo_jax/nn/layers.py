"""Initialisers, the linear map and the loop over layers, shared by the architectures.

Parameters are nested dicts of float32 arrays; a stack of layers has one leading layer axis on
every leaf, so that the stack runs as one `lax.scan`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def lecun_normal(key: jax.Array, shape: Sequence[int], fan_in: int) -> jax.Array:
    """Normal with variance 1 / `fan_in` (LeCun et al., "Efficient BackProp", 1998), float32."""
    return jax.random.normal(key, tuple(shape), jnp.float32) / math.sqrt(fan_in)


def dense(key: jax.Array, fan_in: int, fan_out: int, stack: Sequence[int] = ()) -> dict:
    """A linear map {"kernel": [*stack, fan_in, fan_out], "bias": [*stack, fan_out]}, zero bias."""
    return {
        "kernel": lecun_normal(key, (*stack, fan_in, fan_out), fan_in),
        "bias": jnp.zeros((*stack, fan_out), jnp.float32),
    }


def gathered(weights: jax.Array) -> jax.Array:
    """An array whole on every device of the mesh in use (`jax.sharding.use_abstract_mesh`), however
    they are stored; without one as they are.

    This is the all-gather of ZeRO-3 (arXiv 1910.02054). Left to itself the compiler sometimes moves
    activations to the weights instead.
    """
    if not jax.sharding.get_abstract_mesh().auto_axes:
        return weights
    return jax.lax.with_sharding_constraint(weights, jax.sharding.PartitionSpec())


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [*B, n, D] of a table [V, D] for ids int [*B, n].

    On a mesh every device looks its part of the width up for the ids of all, and the rows are then
    exchanged: to gather a vocabulary, and to sum the gradient of one, would take far more.
    """
    axes = jax.sharding.get_abstract_mesh().auto_axes
    if not axes:
        return table[ids]
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    batch = axes if ids.ndim > 1 and len(ids) % devices == 0 else None
    rows = table[gathered(ids)]
    return jax.lax.with_sharding_constraint(rows, jax.sharding.PartitionSpec(batch))


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., fan_in] by kernel [fan_in, fan_out] -> [..., fan_out], in the dtype of `x`. Under
    `jax.default_matmul_precision("BF16_BF16_F32")` float32 factors are rounded to bfloat16 here, on
    CPUs too, some of which have matrix units for that.

    Only reverse-mode differentiation is defined. Its kernel gradient is written as x^T g over
    merged leading axes: for the transposed product that JAX derives, XLA's CPU backend copies
    every activation, which doubles the time of the backward pass.
    """
    return _matmul(x, kernel.astype(x.dtype))


@jax.custom_vjp
def _matmul(x, kernel):
    flat = _product(x.reshape(-1, x.shape[-1]), gathered(kernel), ((1,), (0,)))
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def _product(a, b, contract):
    dimensions = (contract, ((), ()))
    if a.dtype == jnp.float32 and _rounds_factors():
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(a, b, dimensions)


def _rounds_factors():
    """Whether factors are bfloat16 by `jax.default_matmul_precision`, which XLA's CPU backend
    itself does not heed."""
    return str(jax.config.jax_default_matmul_precision).upper() == "BF16_BF16_F32"


def _matmul_forward(x, kernel):
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, gradient):
    x, kernel = residuals
    rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    dx = _product(gradient, gathered(kernel), ((1,), (1,))).reshape(x.shape)
    # Not `_product`: with rounded factors this one is slower on a CPU, and not always implemented.
    return dx, jax.lax.dot_general(rows, gradient, (((0,), (0,)), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(weights: dict, x: jax.Array) -> jax.Array:
    """x [..., fan_in] -> [..., fan_out] with "kernel" and perhaps "bias", in the dtype of `x`."""
    y = matmul(x, weights["kernel"])
    return y + weights["bias"].astype(x.dtype) if "bias" in weights else y


def rotary_table(
    positions: jax.Array, frequencies: np.ndarray, count: int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [*B, n, F] of position * frequency, float32, for int positions [*B, n] from 0 to
    `count` - 1 and frequencies [F] (RoPE, arXiv 2104.09864).

    They are read from a table: XLA's CPU backend would compute them anew in every layer of an
    unrolled loop.
    """
    angles = np.arange(count, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    cos, sin = (f(angles.astype(np.float64)).astype(np.float32) for f in (np.cos, np.sin))
    return tuple(jnp.take(table, positions, axis=0, mode="clip") for table in (cos, sin))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split form, (a, b) -> (a cos - b sin, b cos + a sin): x [..., H]
    by cos and sin, which broadcast against [..., H / 2]; in float32, returned in x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def softmax_average(*parts: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Averages of values [*B, S, H] with weights softmax(logits) over S, float32 logits [*B, T, S]
    -> [*B, T, H], in the dtype of the values. Each row needs a finite logit.

    Weights are divided by their sum after the product, where there is less to divide, and their
    gradient needs no sum over S (as in FlashAttention, arXiv 2205.14135, section 3.1).

    Args:
        parts: (logits, values), those of a cache and those of new tokens for instance: the softmax
            is over the S of all, which need not be copied into one array.
    """
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x, _ in parts])
    highest = jax.lax.stop_gradient(highest)
    total, sums = 0.0, 0.0
    for logits, values in parts:
        weights = jnp.exp(logits - highest)
        total += weights.sum(axis=-1, keepdims=True)
        weights = weights.astype(values.dtype)
        sums += jnp.matmul(weights, values, preferred_element_type=jnp.float32)
    return (sums / total).astype(parts[0][1].dtype)


def unstack(stack: Any) -> list[Any]:
    """The layers of a stack, one by one."""
    depth = len(jax.tree.leaves(stack)[0])
    return [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(depth)]


@dataclasses.dataclass(frozen=True)
class LayerLoop:
    """How a stack of layers is run.

    remat: recompute each layer in the backward pass instead of storing its activations.
    unroll: one copy of the layer per depth in the program: faster for small layers on a CPU, slower
        to compile.
    """

    remat: bool = False
    unroll: bool = False

    def __call__(self, layer: Callable, x: Any, stack: Any) -> tuple[Any, Any]:
        """`lax.scan` of layer(x, weights) -> (x, output) over the leading axis of `stack`, or over
        a list of layers."""
        layer = jax.checkpoint(layer) if self.remat else layer
        if not isinstance(stack, list):
            return jax.lax.scan(layer, x, stack, unroll=self.unroll)
        outputs = []
        for weights in stack:
            x, output = layer(x, weights)
            outputs.append(output)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)


SCAN = LayerLoop()
