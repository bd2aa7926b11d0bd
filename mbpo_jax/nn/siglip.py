"""SigLIP image encoder: a vision transformer without class token or pooling.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343); shapes and parameter
names as PaliGemma's checkpoints have them (big_vision's ViT with scanned layers): learned position
embedding, pre-norm blocks with biases, tanh GeLU, and a linear `head` to the language width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mbpo_jax.nn.layers import (
    SCAN,
    LayerLoop,
    dense,
    lecun_normal,
    linear,
    matmul,
    softmax_average,
    unstack,
)
from mbpo_jax.nn.navit import layer_norm, patchify

LAYER_NORM_EPSILON = 1e-6
ATTENTION = "MultiHeadDotProductAttention_0"


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Size of the encoder; an image gives (image_size / patch_size)^2 tokens."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: int  # pixels, square

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")


def init(key: jax.Array, config: SiglipConfig, output_dim: int) -> dict:
    """Random float32 parameters; the blocks are stacked along a leading layer axis."""
    width, depth, heads = config.width, config.depth, config.num_heads
    head_dim = width // heads
    keys = iter(jax.random.split(key, 16))

    def norm(*stack: int) -> dict:
        return {"scale": jnp.ones((*stack, width)), "bias": jnp.zeros((*stack, width))}

    def projection() -> dict:
        return {
            "kernel": lecun_normal(next(keys), (depth, width, heads, head_dim), width),
            "bias": jnp.zeros((depth, heads, head_dim)),
        }

    patch = (config.patch_size, config.patch_size, 3)
    return {
        "embedding": {
            "kernel": lecun_normal(next(keys), (*patch, width), patch[0] * patch[1] * 3),
            "bias": jnp.zeros(width),
        },
        "pos_embedding": jax.random.normal(next(keys), (1, config.num_tokens, width)) * width**-0.5,
        "Transformer": {
            "encoderblock": {
                "LayerNorm_0": norm(depth),
                "LayerNorm_1": norm(depth),
                ATTENTION: {
                    "query": projection(),
                    "key": projection(),
                    "value": projection(),
                    "out": {
                        "kernel": lecun_normal(next(keys), (depth, heads, head_dim, width), width),
                        "bias": jnp.zeros((depth, width)),
                    },
                },
                "MlpBlock_0": {
                    "Dense_0": dense(next(keys), width, config.mlp_dim, (depth,)),
                    "Dense_1": dense(next(keys), config.mlp_dim, width, (depth,)),
                },
            },
            "encoder_norm": norm(),
        },
        "head": dense(next(keys), width, output_dim),
    }


def for_inference(params: dict, dtype: jnp.dtype) -> dict:
    """The same encoder as it is read fastest where no gradient is computed: layers one by one,
    which nothing has to copy out of a stack, queries, keys and values by one matrix, and matrices
    in the products' `dtype`, so that no output changes."""

    def cast(path, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key == "kernel" else x

    def prepared(block: dict) -> dict:
        attention = block[ATTENTION]
        parts = [attention[name] for name in ("query", "key", "value")]
        joined = {name: jnp.concatenate([p[name] for p in parts], axis=-2) for name in parts[0]}
        block = {**block, ATTENTION: {"qkv": joined, "out": attention["out"]}}
        return jax.tree_util.tree_map_with_path(cast, block)

    transformer = params["Transformer"]
    blocks = [prepared(block) for block in unstack(transformer["encoderblock"])]
    return {**params, "Transformer": {**transformer, "encoderblock": blocks}}


def encode(
    params: dict,
    config: SiglipConfig,
    images: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    loop: LayerLoop = SCAN,
) -> jax.Array:
    """Image tokens.

    Args:
        images: float32 [B, image_size, image_size, 3] in [-1, 1].
        dtype: of the matrix products; normalisation and softmax are float32.

    Returns:
        [B, num_tokens, output_dim] of `dtype`.
    """
    x = _patch_embedding(params["embedding"], config, images)
    x = (x + params["pos_embedding"]).astype(dtype)

    def block(x: jax.Array, weights: dict) -> tuple[jax.Array, None]:
        x = x + _attention(
            weights[ATTENTION], layer_norm(x, weights["LayerNorm_0"], LAYER_NORM_EPSILON)
        )
        mlp = weights["MlpBlock_0"]
        normed = layer_norm(x, weights["LayerNorm_1"], LAYER_NORM_EPSILON)
        hidden = linear(mlp["Dense_0"], normed)
        return x + linear(mlp["Dense_1"], jax.nn.gelu(hidden, approximate=True)), None

    transformer = params["Transformer"]
    x, _ = loop(block, x, transformer["encoderblock"])
    return linear(params["head"], layer_norm(x, transformer["encoder_norm"], LAYER_NORM_EPSILON))


def _patch_embedding(weights: dict, config: SiglipConfig, images: jax.Array) -> jax.Array:
    """A convolution whose stride is its window, written as one matrix product."""
    x = patchify(images, config.patch_size)
    return matmul(x, weights["kernel"].reshape(x.shape[-1], -1)) + weights["bias"]


def _attention(weights: dict, x: jax.Array) -> jax.Array:
    def project(name: str) -> jax.Array:
        kernel, bias = weights[name]["kernel"], weights[name]["bias"]
        heads = matmul(x, kernel.reshape(x.shape[-1], -1)).reshape(*x.shape[:2], *bias.shape)
        return (heads + bias.astype(x.dtype)).swapaxes(1, 2)

    if "qkv" in weights:
        query, key, value = jnp.split(project("qkv"), 3, axis=1)
    else:
        query, key, value = (project(name) for name in ("query", "key", "value"))
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bnqh,bnkh->bnqk", query, key, preferred_element_type=jnp.float32)
    mixed = softmax_average((logits, value)).swapaxes(1, 2)
    out = weights["out"]
    kernel = out["kernel"].reshape(-1, x.shape[-1])
    return matmul(mixed.reshape(*x.shape[:2], -1), kernel) + out["bias"].astype(x.dtype)
