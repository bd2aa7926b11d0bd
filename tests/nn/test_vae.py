"""The autoencoder's convolutions, shapes and scaling (golden values: tests/world_model)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.nn import vae
from mbpo_jax.nn.layers import matmul
from mbpo_jax.nn.vae import VAEConfig


@pytest.mark.parametrize("inputs", [4, 128])  # patches, and a product for each kernel pixel
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_equals_xla(stride, inputs):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {
        "kernel": jax.random.normal(keys[0], (3, 3, inputs, 5)),
        "bias": jax.random.normal(keys[1], (5,)),
    }
    x = jax.random.normal(keys[2], (2, 7, 9, inputs)) / np.sqrt(inputs)
    expected = jax.lax.conv_general_dilated(
        x,
        weights["kernel"],
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = vae.convolve(weights, x, stride)
    np.testing.assert_allclose(found, expected + weights["bias"], atol=1e-5)


def test_matmul_gradient_equals_derived_one():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (2, 3, 4)), jax.random.normal(keys[1], (4, 5))
    g = jax.random.normal(keys[2], (2, 3, 5))
    expected = jax.vjp(lambda x, w: x @ w, x, w)[1](g)
    found = jax.vjp(matmul, x, w)[1](g)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_shapes_and_scaling(patch_size):
    config = VAEConfig(
        8, (1, 2), 1, 4, scale_factor=2.0, shift_factor=0.5, norm_groups=4, patch_size=patch_size
    )
    params = vae.init(config, jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (2, 16, 8, 3), minval=-1.0)
    mean, log_variance = vae.moments(params, config, images)
    assert mean.shape == log_variance.shape == (2, 8 // patch_size, 4 // patch_size, 4)
    latents = vae.scale_latents(config, mean)
    np.testing.assert_allclose(latents, 2.0 * (mean - 0.5), atol=1e-6)
    assert vae.decode(params, config, latents).shape == images.shape


def test_downsampling_pads_right_and_bottom():
    # A kernel with its weight in the top left corner keeps the even pixels: nothing is shifted.
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    config = VAEConfig(1, (1, 1), 0, 1, norm_groups=1)
    weights = {"block": {}, "downsample": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    found = vae.encoder_level(weights, x, config)
    np.testing.assert_array_equal(found[0, :, :, 0], [[0, 2], [8, 10]])
