import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.flops import matmul_flops

A, B = jnp.ones((2, 3)), jnp.ones((3, 4))


def test_a_product_costs_two_operations_per_entry_and_term():
    assert matmul_flops(jnp.matmul, A, B) == 2 * 2 * 3 * 4


def test_abstract_arguments():
    a, b = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (A, B))
    assert matmul_flops(jnp.matmul, a, b) == 48


def test_loops_count_as_often_as_they_run():
    def five_times(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert matmul_flops(jax.jit(five_times), A, jnp.ones((3, 3))) == 5 * 2 * 2 * 3 * 3


def test_gradient_has_two_more_products():
    assert matmul_flops(jax.grad(lambda a, b: (a @ b).sum(), argnums=(0, 1)), A, B) == 3 * 48


def test_checkpointed_product_is_computed_again():
    def loss(a, b):
        return jnp.sin(jax.checkpoint(lambda a, b: jnp.sin(a @ b) @ b.T)(a, b)).sum()

    plain = matmul_flops(jax.grad(lambda a, b: jnp.sin(jnp.sin(a @ b) @ b.T).sum()), A, B)
    assert matmul_flops(jax.grad(loss), A, B) > plain


def test_a_cond_costs_its_dearer_branch():
    def either(flag, a, b):
        return jax.lax.cond(flag, lambda: a @ b, lambda: jnp.zeros((2, 4)))

    assert matmul_flops(either, True, A, B) == 48


def test_convolution():
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(images, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "VALID", dimension_numbers=layout
        )

    assert matmul_flops(convolve, images, kernel) == 2 * (3 * 3 * 3) * (2 * 6 * 6 * 5)


def test_unknown_number_of_rounds_is_an_error():
    def forever(a, b):
        return jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a @ b, a)

    with pytest.raises(ValueError, match="while_loop"):
        matmul_flops(forever, A, jnp.ones((3, 3)))
