import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.rl.gae import (
    chunk_discount,
    exchanged,
    generalized_advantages,
    leave_one_out,
)
from mbpo_jax.types import Branch


def test_two_chunks_by_hand():
    # γ = 0.9, λ = 0.5, V = (1, 2), bootstrap 4, r = (0, 1), no end:
    # δ1 = 1 + 0.9·4 - 2 = 2.6; δ0 = 0 + 0.9·2 - 1 = 0.8; A0 = 0.8 + 0.45·2.6 = 1.97
    advantage, target = generalized_advantages(
        jnp.array([[0.0], [1.0]]),
        jnp.array([[1.0], [2.0]]),
        jnp.zeros((2, 1)),
        jnp.array([4.0]),
        0.9,
        0.5,
    )
    np.testing.assert_allclose(advantage[:, 0], [1.97, 2.6], atol=1e-6)
    np.testing.assert_allclose(target[:, 0], [2.97, 4.6], atol=1e-6)


def test_an_ended_chunk_does_not_bootstrap():
    # done after chunk 0: A0 = r0 - V0 = 1 - 0.25, whatever follows.
    advantage, _ = generalized_advantages(
        jnp.array([[1.0], [7.0]]),
        jnp.array([[0.25], [3.0]]),
        jnp.array([[1.0], [0.0]]),
        jnp.array([9.0]),
        0.9,
        0.95,
    )
    np.testing.assert_allclose(advantage[0, 0], 0.75, atol=1e-6)


def test_discount_conventions():
    # 0.99^10 = 0.90438208, 0.99^9 = 0.91351725
    np.testing.assert_allclose(chunk_discount(0.99, 10, "paper"), (0.90438208, 0.91351725))
    assert chunk_discount(0.99, 10, "reference") == (0.99, 1.0)
    with pytest.raises(ValueError, match="discount_per"):
        chunk_discount(0.99, 10, "step")


def test_leave_one_out_by_hand():
    # (1, 2, 6): others' means 4, 3.5, 1.5; (0, 0, 3): 1.5, 1.5, 0.
    found = leave_one_out(jnp.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    np.testing.assert_allclose(found, [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0], atol=1e-6)


def test_groups_exchange_their_advantages():
    # Groups (1, 2), (3, 4) and (5, 6) of two branches: each has those of the group before it.
    blank = dict.fromkeys(Branch.__dataclass_fields__)
    branch = Branch(**{**blank, "advantage": jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])})
    np.testing.assert_array_equal(exchanged(branch, 2).advantage, [[5, 6, 1, 2, 3, 4]])
