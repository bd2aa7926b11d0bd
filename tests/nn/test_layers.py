"""The softmax over parts: by hand, and beside that of one array with its gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn.layers import softmax_average


def test_softmax_average_by_hand():
    # Weights 1 : 3 of logits 0 and log 3.
    logits, values = jnp.array([[0.0, jnp.log(3.0)]]), jnp.array([[8.0, -4.0], [0.0, 4.0]])
    np.testing.assert_allclose(softmax_average((logits, values)), [[2.0, 2.0]], atol=1e-6)


def test_softmax_average_of_parts_is_that_of_the_whole():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 30 * jax.random.normal(keys[0], (2, 4, 7))
    logits = logits.at[:, 0, :3].set(-jnp.inf).at[:, 1, 3:].set(-jnp.inf)  # a part may be unseen
    values = jax.random.normal(keys[1], (2, 7, 5))
    cotangent = jax.random.normal(keys[2], (2, 4, 5))

    def whole(logits, values):
        return softmax_average((logits, values))

    def parts(logits, values):
        return softmax_average((logits[..., :3], values[:, :3]), (logits[..., 3:], values[:, 3:]))

    def plain(logits, values):
        return jax.nn.softmax(logits, axis=-1) @ values

    expected, pull = jax.vjp(plain, logits, values)
    for function in (whole, parts):
        found, back = jax.vjp(function, logits, values)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        for a, b in zip(back(cotangent), pull(cotangent)):
            np.testing.assert_allclose(a, b, atol=1e-5)
