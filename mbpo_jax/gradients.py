"""Gradient accumulation: a batch in slices, one after the other, so that memory need not grow with
the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbpo_jax.types import Array, Params


def split_rows(tree: Any, slices: int) -> Any:
    """Leading axis [B] -> [slices, B / slices]; slice i holds the rows i, i + slices, ...

    In this order every device that holds contiguous rows of the batch holds as many of each slice.

    Raises:
        ValueError: when B is not a multiple of `slices`.
    """

    def one(x):
        if len(x) % slices:
            raise ValueError(f"a batch of {len(x)} rows does not divide into {slices} slices")
        return jnp.swapaxes(x.reshape(-1, slices, *x.shape[1:]), 0, 1)

    return jax.tree.map(one, tree)


def join_rows(tree: Any) -> Any:
    """Inverse of `split_rows`: [slices, B / slices, ...] -> [B, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def summed_value_and_grad(
    loss_fn: Callable[[Params, Any, Array], tuple[Array, Any]], slices: int
) -> Callable[[Params, Any], tuple[tuple[Array, Any], Params]]:
    """`(params, batch) -> ((loss, aux), gradient)`, loss and gradient being sums over the slices of
    the batch and `aux` stacked along a new leading axis [slices].

    Args:
        loss_fn: `(params, slice, index of the slice) -> (loss, aux)`.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def whole(params, batch):
        (loss, aux), gradient = value_and_grad(params, batch, 0)
        return (loss, jax.tree.map(lambda x: x[None], aux)), gradient

    def sliced(params, batch):
        def add(total, now):
            (loss, aux), gradient = value_and_grad(params, *now)
            return jax.tree.map(jnp.add, total, (loss, gradient)), aux

        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        rows = split_rows(batch, slices), jnp.arange(slices)
        (loss, gradient), aux = jax.lax.scan(add, nothing, rows)
        return (loss, aux), gradient

    return whole if slices == 1 else sliced
