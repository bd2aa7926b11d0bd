"""BAGEL's SigLIP vision transformer on patches of pictures of any aspect (arXiv 2505.14683; NaViT
arXiv 2307.06304; SigLIP arXiv 2303.15343).

Pictures of one shape form a batch, so NaViT's block-diagonal attention is plain attention.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn.layers import dense, linear, softmax_average
from mbpo_jax.shapes import Array, Float, Int, Shaped

Params = Any


@dataclasses.dataclass(frozen=True)
class NaViTConfig:
    """Sizes of the vision transformer."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int  # pixels
    max_patches_per_side: int  # side of the grid that position ids index
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of activations and matmuls; norms and softmax are float32


def init(config: NaViTConfig, key: Array) -> Params:
    """Fresh weights: fan-in scaled matrices, small learned positions, zero biases."""
    d, f, n = config.hidden_size, config.mlp_size, config.num_layers
    keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    table = (config.max_patches_per_side**2, d)
    return {
        "patch_embedding": dense(next(keys), 3 * config.patch_size**2, d),
        "position_embedding": {"embedding": 0.02 * jax.random.normal(next(keys), table)},
        "layers": {
            "layer_norm1": norm(n, d),
            "self_attn": {
                name: dense(next(keys), d, d, (n,))
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            },
            "layer_norm2": norm(n, d),
            "mlp": {"fc1": dense(next(keys), d, f, (n,)), "fc2": dense(next(keys), f, d, (n,))},
        },
        "post_layernorm": norm(d),
    }


def patchify(images: Shaped[Array, "B H W C"], patch: int) -> Shaped[Array, "B n patch_values"]:
    """Row-major patches, each flattened as (row in patch, column in patch, channel)."""
    b, height, width, c = images.shape
    x = images.reshape(b, height // patch, patch, width // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(
    patches: Float[Array, "B n patch_values"], rows: int, columns: int, patch: int
) -> Float[Array, "B H W C"]:
    """Inverse of `patchify`; rows and columns count patches."""
    b = patches.shape[0]
    x = patches.reshape(b, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, -1)


def grid_ids(rows: int, columns: int, side: int) -> np.ndarray:
    """Position ids row * side + column [rows * columns] of a picture in the top left of the grid.

    Raises:
        ValueError: the picture is larger than the grid.
    """
    if rows > side or columns > side:
        raise ValueError(f"A picture of {rows}x{columns} tokens exceeds the {side}x{side} grid.")
    return (np.arange(rows)[:, None] * side + np.arange(columns)).reshape(-1)


def layer_norm(x: Array, weights: Params, eps: float) -> Array:
    """LayerNorm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + eps)
    return (y * weights["scale"] + weights["bias"]).astype(x.dtype)


def embed(
    params: Params, config: NaViTConfig, patches: Float[Array, " B n v"], ids: Int[Array, " n"]
) -> Array:
    """Patch projection plus learned position [B, n, D]."""
    x = linear(params["patch_embedding"], patches.astype(config.dtype))
    return x + params["position_embedding"]["embedding"][ids].astype(x.dtype)


def encoder_layer(weights: Params, config: NaViTConfig, x: Float[Array, "B n D"]) -> Array:
    """One pre-norm encoder layer."""
    b, n, d = x.shape
    attn = weights["self_attn"]
    y = layer_norm(x, weights["layer_norm1"], config.norm_eps)
    q, k, v = (
        linear(attn[name], y).reshape(b, n, config.num_heads, -1).swapaxes(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bnqh,bnkh->bnqk", q, k, preferred_element_type=jnp.float32)
    mixed = softmax_average((scores, v)).swapaxes(1, 2).reshape(b, n, d)
    x = x + linear(attn["out_proj"], mixed)
    y = layer_norm(x, weights["layer_norm2"], config.norm_eps)
    y = jax.nn.gelu(linear(weights["mlp"]["fc1"], y), approximate=True)
    return x + linear(weights["mlp"]["fc2"], y)


def forward(
    params: Params, config: NaViTConfig, images: Float[Array, "B H W 3"]
) -> Float[Array, "B n D"]:
    """Features of every patch, after the final LayerNorm.

    Args:
        images: in [-1, 1], sides multiples of the patch size.

    Raises:
        ValueError: the sides are no multiple of the patch, or exceed the position grid.
    """
    height, width = images.shape[1:3]
    patch = config.patch_size
    if height % patch or width % patch:
        raise ValueError(f"Image of {height}x{width} pixels: sides must be multiples of {patch}.")
    ids = grid_ids(height // patch, width // patch, config.max_patches_per_side)
    return encode(params, config, patchify(images, patch), ids)


def encode(
    params: Params, config: NaViTConfig, patches: Float[Array, " B n v"], ids: Int[Array, " n"]
) -> Float[Array, "B n D"]:
    """`forward` of pictures given as patches with their position ids."""
    x = embed(params, config, patches, ids)
    x, _ = jax.lax.scan(lambda x, w: (encoder_layer(w, config, x), None), x, params["layers"])
    return layer_norm(x, params["post_layernorm"], config.norm_eps)
