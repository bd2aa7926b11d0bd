"""Matrix multiplication by a weight, with a backward pass that suits XLA's CPU backend."""

import jax
from jaxtyping import Array, Float


@jax.custom_vjp
def matmul(x: Float[Array, "*B i"], weight: Float[Array, "i o"]) -> Float[Array, "*B o"]:
    """x @ weight.

    JAX derives the weight's gradient as the transpose of a product, for which XLA on CPU copies
    every activation into transposed order; written as x^T g the backward pass takes half the time.
    The gradient is the same; only reverse-mode differentiation is defined.
    """
    return x @ weight


def _forward(x, weight):
    return x @ weight, (x, weight)


def _backward(residuals, gradient):
    x, weight = residuals
    rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    dx = (gradient @ weight.T).reshape(x.shape)
    return dx, jax.lax.dot_general(rows, gradient, (((0,), (0,)), ((), ())))


matmul.defvjp(_forward, _backward)
