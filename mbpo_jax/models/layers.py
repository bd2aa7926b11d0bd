"""Initialisers and the linear map shared by the architectures.

Parameters are nested dicts of float32 arrays; a stack of layers has one leading layer axis on
every leaf, so that the stack runs as one `lax.scan`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def lecun_normal(key: jax.Array, shape: Sequence[int], fan_in: int) -> jax.Array:
    """Normal with variance 1 / `fan_in` (LeCun et al., "Efficient BackProp", 1998), float32."""
    return jax.random.normal(key, tuple(shape), jnp.float32) / math.sqrt(fan_in)


def dense(key: jax.Array, fan_in: int, fan_out: int, stack: Sequence[int] = ()) -> dict:
    """A linear map {"kernel": [*stack, fan_in, fan_out], "bias": [*stack, fan_out]}, zero bias."""
    return {
        "kernel": lecun_normal(key, (*stack, fan_in, fan_out), fan_in),
        "bias": jnp.zeros((*stack, fan_out), jnp.float32),
    }


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., fan_in] by kernel [fan_in, fan_out] -> [..., fan_out], in the dtype of `x`.

    Leading axes are merged first: XLA's CPU backend is several times slower in the kernel's
    gradient when that sums over more than one axis.
    """
    flat = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(weights: dict, x: jax.Array) -> jax.Array:
    """x [..., fan_in] -> [..., fan_out] with "kernel" and "bias", in the dtype of `x`."""
    return matmul(x, weights["kernel"]) + weights["bias"].astype(x.dtype)
