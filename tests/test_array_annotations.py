"""The package is imported under jaxtyping's hook (`conftest.py`): wrong shapes are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mbpo_jax.mbpo import generalized_advantages
from mbpo_jax.nn.navit import patchify
from mbpo_jax.world_model.autoencoder import to_pixels


def test_a_wrong_shape_is_refused():
    value, last = jnp.zeros((3, 2)), jnp.zeros(2)
    generalized_advantages(value, value, value, last, 0.9, 0.9)
    with pytest.raises(TypeCheckError, match="bootstrap_value"):
        generalized_advantages(value, value, value, jnp.zeros((1, 2)), 0.9, 0.9)


def test_models_are_checked_too():
    with pytest.raises(TypeCheckError, match="images"):
        patchify(np.zeros((8, 8, 3)), 4)


def test_a_wrong_dtype_is_refused():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    to_pixels(images)
    with pytest.raises(TypeCheckError, match="images"):
        to_pixels(images.astype(np.float32))
