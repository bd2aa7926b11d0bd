"""The convolutional autoencoder of FLUX.1, as BAGEL uses it (arXiv 2505.14683, section 2.1).

NHWC throughout. The parameter tree mirrors the names of the public checkpoint
(`encoder.down.0.block.0.conv1`, ...).
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn.layers import matmul, softmax_average
from mbpo_jax.shapes import Array, Float

Params = Any


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder."""

    channels: int
    multipliers: tuple[int, ...]  # channels per level; every level but the last halves the image
    num_res_blocks: int  # per encoder level; decoder levels have one more
    z_channels: int
    scale_factor: float = 1.0  # latent = scale_factor * (sample - shift_factor)
    shift_factor: float = 0.0
    norm_groups: int = 32
    patch_size: int = 1  # space-to-depth before the first convolution; 1 = the released model
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of activations and matmuls; norms and softmax are float32

    @property
    def downsample(self) -> int:
        """Pixels per latent."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)


def init(config: VAEConfig, key: Array) -> Params:
    """Fresh weights: fan-in scaled kernels, zero biases, the last convolution of a block zero.

    The convolutions into and out of the latents and the pixels start orthogonal at their centre and
    zero elsewhere (delta-orthogonal, arXiv 1806.05393), so a fresh model is close to a linear
    autoencoder of patches, from which training is several times faster.
    """
    keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def conv(size, inputs, outputs, scale=1.0):
        kernel = jax.random.normal(next(keys), (size, size, inputs, outputs))
        kernel = kernel * scale / np.sqrt(size * size * inputs)
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    def delta(inputs, outputs):
        centre = jax.nn.initializers.orthogonal(max(1.0, outputs / inputs) ** 0.5)
        kernel = jnp.zeros((3, 3, inputs, outputs))
        kernel = kernel.at[1, 1].set(centre(next(keys), (inputs, outputs)))
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    def norm(width):
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def block(inputs, outputs):
        weights = {
            "norm1": norm(inputs),
            "conv1": conv(3, inputs, outputs),
            "norm2": norm(outputs),
            "conv2": conv(3, outputs, outputs, scale=0.0),
        }
        if inputs != outputs:
            weights["nin_shortcut"] = conv(1, inputs, outputs)
        return weights

    def lowest(width):
        attention = {"norm": norm(width), "proj_out": conv(1, width, width, scale=0.0)}
        attention |= {name: conv(1, width, width) for name in "qkv"}
        return {
            "block_1": block(width, width),
            "attn_1": attention,
            "block_2": block(width, width),
        }

    widths = [config.channels * m for m in config.multipliers]
    levels, pixels = len(widths), 3 * config.patch_size**2

    down, width = {}, config.channels
    for i in range(levels):
        blocks = {}
        for j in range(config.num_res_blocks):
            blocks[str(j)] = block(width, widths[i])
            width = widths[i]
        down[str(i)] = {"block": blocks}
        if i < levels - 1:
            down[str(i)]["downsample"] = {"conv": conv(3, width, width)}
    encoder = {
        "conv_in": delta(pixels, config.channels),
        "down": down,
        "mid": lowest(width),
        "norm_out": norm(width),
        "conv_out": delta(width, 2 * config.z_channels),
    }

    decoder = {"conv_in": delta(config.z_channels, width), "mid": lowest(width)}
    up = {}
    for i in reversed(range(levels)):
        blocks = {}
        for j in range(config.num_res_blocks + 1):
            blocks[str(j)] = block(width, widths[i])
            width = widths[i]
        up[str(i)] = {"block": blocks}
        if i > 0:
            up[str(i)]["upsample"] = {"conv": conv(3, width, width)}
    decoder |= {"up": up, "norm_out": norm(width), "conv_out": delta(width, pixels)}
    return {"encoder": encoder, "decoder": decoder}


def convolve(weights: Params, x: Float[Array, "B H W C"], stride: int = 1) -> Array:
    """Square convolution without padding.

    On CPU it is written as patch extraction and one matmul, or, where patches would be large, as
    one matmul for each pixel of the kernel: XLA's CPU gradient of a convolution is about four times
    slower.
    """
    kernel = weights["kernel"].astype(x.dtype)
    size, _, inputs, outputs = kernel.shape
    if jax.default_backend() != "cpu":
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    else:
        height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
        x = jax.lax.optimization_barrier(x)  # lest what gives x is computed for every column
        columns = [
            x[:, i : i + stride * height : stride, j : j + stride * width : stride]
            for i in range(size)
            for j in range(size)
        ]
        if inputs < 128:
            y = matmul(jnp.concatenate(columns, axis=-1), kernel.reshape(-1, outputs))
        else:
            matrices = kernel.reshape(-1, inputs, outputs)
            y = sum(matmul(column, matrix) for column, matrix in zip(columns, matrices))
    return y + weights["bias"].astype(x.dtype)


def moments(
    params: Params, config: VAEConfig, images: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B h w z"], Float[Array, "B h w z"]]:
    """Mean and log-variance of the posterior of images in [-1, 1] (not scaled or shifted)."""
    weights = params["encoder"]
    x = _space_to_depth(images.astype(config.dtype), config.patch_size)
    x = convolve(weights["conv_in"], pad(x))
    for i in range(len(config.multipliers)):
        x = encoder_level(weights["down"][str(i)], x, config)
    x = middle(weights["mid"], x, config)
    x = jax.nn.silu(group_norm(weights["norm_out"], x, config))
    mean, log_variance = jnp.split(convolve(weights["conv_out"], pad(x)), 2, axis=-1)
    return mean.astype(jnp.float32), log_variance.astype(jnp.float32)


def scale_latents(config: VAEConfig, raw: Array) -> Array:
    """Raw latents to the units that `decode` takes."""
    return config.scale_factor * (raw - config.shift_factor)


def decode(
    params: Params, config: VAEConfig, latents: Float[Array, "B h w z"]
) -> Float[Array, "B H W 3"]:
    """Images in about [-1, 1], not clipped, of scaled latents."""
    weights = params["decoder"]
    x = (latents / config.scale_factor + config.shift_factor).astype(config.dtype)
    x = middle(weights["mid"], convolve(weights["conv_in"], pad(x)), config)
    for i in reversed(range(len(config.multipliers))):
        level = weights["up"][str(i)]
        for j in range(config.num_res_blocks + 1):
            x = _res_block(level["block"][str(j)], x, config)
        if "upsample" in level:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = convolve(level["upsample"]["conv"], pad(x))
    x = jax.nn.silu(group_norm(weights["norm_out"], x, config))
    x = convolve(weights["conv_out"], pad(x))
    return _depth_to_space(x, config.patch_size).astype(jnp.float32)


def group_norm(weights: Params, x: Float[Array, "B H W C"], config: VAEConfig) -> Array:
    """GroupNorm over space and the channels of a group, computed in float32.

    Space is averaged first, channel by channel: XLA's CPU backend is several times slower at
    averages over axes on both sides of the one it keeps.
    """

    def group_mean(y):
        groups = y.mean((1, 2)).reshape(len(y), config.norm_groups, -1).mean(-1)
        return groups.repeat(y.shape[-1] // config.norm_groups, axis=-1)[:, None, None]

    y = x.astype(jnp.float32)
    y = y - group_mean(y)
    y = y * (jax.lax.rsqrt(group_mean(jnp.square(y)) + config.norm_eps) * weights["scale"])
    return (y + weights["bias"]).astype(x.dtype)


def pad(x: Float[Array, "B H W C"]) -> Array:
    """One zero pixel on every side."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _res_block(weights, x, config):
    y = jax.nn.silu(group_norm(weights["norm1"], x, config))
    y = convolve(weights["conv1"], pad(y))
    y = jax.nn.silu(group_norm(weights["norm2"], y, config))
    y = convolve(weights["conv2"], pad(y))
    return y + (convolve(weights["nin_shortcut"], x) if "nin_shortcut" in weights else x)


def encoder_level(weights: Params, x: Float[Array, "B H W C"], config: VAEConfig) -> Array:
    """Residual blocks, then a halving of the image on every level but the last."""
    for j in range(config.num_res_blocks):
        x = _res_block(weights["block"][str(j)], x, config)
    if "downsample" in weights:
        # Only right and bottom are padded, as in the public checkpoint.
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        x = convolve(weights["downsample"]["conv"], x, stride=2)
    return x


def middle(weights: Params, x: Float[Array, "B H W C"], config: VAEConfig) -> Array:
    """The lowest resolution: residual block, attention, residual block."""
    return _res_block(weights["block_2"], middle_attention(weights, x, config), config)


def middle_attention(weights: Params, x: Float[Array, "B H W C"], config: VAEConfig) -> Array:
    """The first two thirds of `middle`."""
    return attention_block(weights["attn_1"], _res_block(weights["block_1"], x, config), config)


def attention_block(weights: Params, x: Float[Array, "B H W C"], config: VAEConfig) -> Array:
    """Single-head attention over all positions, with residual."""
    b, height, width, c = x.shape
    y = group_norm(weights["norm"], x, config)
    q, k, v = (convolve(weights[name], y).reshape(b, -1, c) for name in "qkv")
    scores = jnp.einsum("bqc,bkc->bqk", q * c**-0.5, k, preferred_element_type=jnp.float32)
    y = softmax_average((scores, v))
    return x + convolve(weights["proj_out"], y.reshape(b, height, width, c))


def _space_to_depth(x, p):
    b, height, width, c = x.shape
    x = x.reshape(b, height // p, p, width // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height // p, width // p, p * p * c)


def _depth_to_space(x, p):
    b, height, width, c = x.shape
    x = x.reshape(b, height, width, p, p, c // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height * p, width * p, c // (p * p))
