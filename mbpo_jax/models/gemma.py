"""Two Gemma transformers that share attention: a language model and an action expert.

π0 (Black et al., arXiv 2410.24164) runs both side by side: the language model reads a prefix
(image and prompt tokens) that never looks at the expert's tokens; the expert's tokens attend to
the prefix and to each other, layer by layer. So the prefix is computed once, its keys and values
are kept, and every denoising step runs the expert alone. π0.5 modulates the expert's norms by the
flow time (adaptive RMSNorm).

Parameter names and shapes are openpi's: names that end in `_1` belong to the expert, everything
under `layers` has a leading layer axis. Dimension letters: B batch, M flow times per prefix,
S prefix tokens, T expert tokens, D width, N query heads, G key/value heads, R = N / G, H head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mbpo_jax.models.layers import lecun_normal, linear

RMS_EPSILON = 1e-6
ROPE_WAVELENGTH = 10_000.0
MASKED_LOGIT = -2.3819763e38  # written, not added: a row without any valid key attends uniformly


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Size of one transformer. Both of a pair have the same depth and heads."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )


@struct.dataclass
class KVCache:
    """Keys (after RoPE) and values of a prefix, [L, B, S, G, H] with L the layers; `mask` bool
    [B, S] says which tokens are real."""

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


def init(
    key: jax.Array, vocab_size: int, language: GemmaConfig, expert: GemmaConfig, adaptive: bool
) -> dict:
    """Random float32 parameters of both transformers.

    `adaptive` gives the expert norms modulated by a condition of the expert's width. Modulations
    start at zero, so every residual branch of the expert is closed at first (as in DiT, Peebles
    & Xie, arXiv 2212.09748).

    Raises:
        ValueError: the two cannot share attention (depth or heads differ).
    """
    shared = ("depth", "num_heads", "num_kv_heads", "head_dim")
    differing = [name for name in shared if getattr(language, name) != getattr(expert, name)]
    if differing:
        raise ValueError(f"language model and action expert must agree in {', '.join(differing)}")
    keys = iter(jax.random.split(key, 16))
    layers: dict = {"attn": {}}
    for suffix, config in (("", language), ("_1", expert)):
        modulated = adaptive and suffix == "_1"
        stack = (config.depth,)
        layers["attn"] |= _init_attention(keys, config, suffix)
        layers[f"mlp{suffix}"] = {
            "gating_einsum": lecun_normal(
                next(keys), (*stack, 2, config.width, config.mlp_dim), config.width
            ),
            "linear": lecun_normal(
                next(keys), (*stack, config.mlp_dim, config.width), config.mlp_dim
            ),
        }
        for name in ("pre_attention_norm", "pre_ffw_norm"):
            layers[f"{name}{suffix}"] = _init_norm(config.width, stack, modulated)
    table = jax.random.normal(next(keys), (vocab_size, language.width)) * language.width**-0.5
    return {
        "embedder": {"input_embedding": table},
        "layers": layers,
        "final_norm": _init_norm(language.width, (), False),
        "final_norm_1": _init_norm(expert.width, (), adaptive),
    }


def embed(params: dict, tokens: jax.Array) -> jax.Array:
    """Token ids int32 [*B, S] -> float32 [*B, S, D], scaled by sqrt(D) as Gemma does."""
    table = params["embedder"]["input_embedding"]
    return table[tokens] * table.shape[-1] ** 0.5


def encode_prefix(
    params: dict, tokens: jax.Array, mask: jax.Array, remat: bool = False
) -> tuple[jax.Array, KVCache]:
    """Runs the language model over a bidirectional prefix.

    Args:
        tokens: [B, S, D]; their dtype is the compute dtype.
        mask: bool [B, S]; positions count real tokens only.

    Returns:
        Hidden states after the final norm [B, S, D] (finite garbage where `mask` is False), and the
        cache for `denoise`.
    """
    positions = jnp.cumsum(mask, axis=-1) - 1
    attend = (mask[:, :, None] & mask[:, None, :])[:, None]

    def block(x: jax.Array, weights: dict) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return _block(weights, x, positions[:, None], attend)

    x, (keys, values) = _scan(block, tokens[:, None], _member(params["layers"], ""), remat)
    features, _ = _norm(params["final_norm"], x[:, 0], None)
    return features, KVCache(keys[:, :, 0], values[:, :, 0], mask)


def denoise(
    params: dict,
    tokens: jax.Array,
    cache: KVCache,
    condition: jax.Array | None,
    attend: jax.Array,
    remat: bool = False,
) -> jax.Array:
    """Runs the action expert over M sets of tokens that share one prefix.

    Args:
        tokens: [B, M, T, D]; the M sets do not see each other.
        condition: [B, M, D] for adaptive norms, None for plain ones (π0).
        attend: bool [T, T], query by key, attention of the expert's tokens to each other.

    Returns:
        Hidden states after the final norm, [B, M, T, D].
    """
    batch, _, length, _ = tokens.shape
    offset = cache.mask.sum(-1, dtype=jnp.int32)[:, None, None]
    positions = jnp.broadcast_to(offset + jnp.arange(length), (batch, 1, length))

    def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
        weights, keys, values = layer
        x, _ = _block(weights, x, positions, attend, condition, (keys, values, cache.mask))
        return x, None

    layers = (_member(params["layers"], "_1"), cache.keys, cache.values)
    x, _ = _scan(block, tokens, layers, remat)
    features, _ = _norm(params["final_norm_1"], x, condition)
    return features


def _scan(block, x: jax.Array, layers, remat: bool):
    return jax.lax.scan(jax.checkpoint(block) if remat else block, x, layers)


def _member(layers: dict, suffix: str) -> dict:
    """The layers of one transformer of the pair, under names without its suffix."""
    attention = {
        name: layers["attn"][f"{name}{suffix}"]
        for name in ("q_einsum", "kv_einsum", "qkv_einsum", "attn_vec_einsum")
        if f"{name}{suffix}" in layers["attn"]
    }
    blocks = ("mlp", "pre_attention_norm", "pre_ffw_norm")
    return {"attn": attention} | {name: layers[f"{name}{suffix}"] for name in blocks}


def _block(weights, x, positions, attend, condition=None, context=None):
    """One layer over x [B, M, T, D]; also returns its own keys and values [B, M, T, G, H]."""
    normed, gate = _norm(weights["pre_attention_norm"], x, condition)
    mixed, keys_values = _attention(weights["attn"], normed, positions, attend, context)
    x = x + mixed * gate
    normed, gate = _norm(weights["pre_ffw_norm"], x, condition)
    mlp = weights["mlp"]
    gating = mlp["gating_einsum"].astype(x.dtype)
    hidden = jax.nn.gelu(normed @ gating[0], approximate=True) * (normed @ gating[1])
    return x + (hidden @ mlp["linear"].astype(x.dtype)) * gate, keys_values


def _attention(weights, x, positions, attend, context):
    """Grouped-query attention of x [B, M, T, D] to itself and, if given, to a context
    (keys [B, S, G, H], values, mask [B, S]). Logits and softmax are float32."""
    if "qkv_einsum" in weights:
        query, key, value = jnp.einsum(
            "bmtd,cdx->cbmtx", x, _flat_heads(weights["qkv_einsum"]["w"], x.dtype)
        )
        heads, head_dim = weights["qkv_einsum"]["w"].shape[-3::2]
        groups = heads
    else:
        heads, head_dim = weights["q_einsum"]["w"].shape[-3::2]
        groups = weights["kv_einsum"]["w"].shape[-3]
        query = x @ _flat_heads(weights["q_einsum"]["w"], x.dtype)
        key, value = jnp.einsum(
            "bmtd,cdx->cbmtx", x, _flat_heads(weights["kv_einsum"]["w"], x.dtype)
        )
    query, key, value = (z.reshape(*z.shape[:-1], -1, head_dim) for z in (query, key, value))
    query = _rope(query, positions) * head_dim**-0.5
    key = _rope(key, positions)
    query = query.reshape(*query.shape[:-2], groups, heads // groups, head_dim)

    def scores(equation: str, keys: jax.Array, mask: jax.Array) -> jax.Array:
        logits = jnp.einsum(equation, query, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask, logits, MASKED_LOGIT)

    own_mask = attend if attend.ndim == 2 else attend[:, None, None]
    logits = scores("bmtgrh,bmsgh->bgrmts", key, own_mask)
    if context is None:
        probs = jax.nn.softmax(logits).astype(x.dtype)
        mixed = jnp.einsum("bgrmts,bmsgh->bmtgrh", probs, value)
    else:
        # Two products and a joint softmax: the cached keys are never copied next to the new ones.
        context_keys, context_values, context_mask = context
        size = context_keys.shape[1]
        context_logits = scores(
            "bmtgrh,bsgh->bgrmts", context_keys, context_mask[:, None, None, None, None]
        )
        probs = jax.nn.softmax(jnp.concatenate([context_logits, logits], -1)).astype(x.dtype)
        mixed = jnp.einsum("bgrmts,bsgh->bmtgrh", probs[..., :size], context_values)
        mixed += jnp.einsum("bgrmts,bmsgh->bmtgrh", probs[..., size:], value)
    out = weights["attn_vec_einsum"]["w"].astype(x.dtype)
    out = out.reshape(heads * head_dim, -1)
    return mixed.reshape(*mixed.shape[:3], heads * head_dim) @ out, (key, value)


def _flat_heads(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[..., N, D, H] -> [..., D, N * H], so that all heads are one matrix product."""
    weight = weight.astype(dtype).swapaxes(-3, -2)
    return weight.reshape(*weight.shape[:-2], -1)


def _rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions (arXiv 2104.09864) for x [B, M, T, N, H], positions [B, 1 or M, T]."""
    half = x.shape[-1] // 2
    wavelength = ROPE_WAVELENGTH ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions[..., None] / wavelength)[..., None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)


def _norm(weights: dict, x: jax.Array, condition: jax.Array | None):
    """RMSNorm and the gate of the branch that follows: plain (gate 1), or modulated by
    `condition` [B, M, D] as scale, shift and gate (adaRMS)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + RMS_EPSILON)
    if "scale" in weights:
        return (normed * (1 + weights["scale"])).astype(x.dtype), jnp.ones((), x.dtype)
    modulation = linear(weights["Dense_0"], condition)[..., None, :]
    scale, shift, gate = jnp.split(modulation, 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)


def _init_attention(keys, config: GemmaConfig, suffix: str) -> dict:
    depth, width, head_dim = config.depth, config.width, config.head_dim
    heads, groups = config.num_heads, config.num_kv_heads
    out_shape = (depth, heads, head_dim, width)
    tree = {
        f"attn_vec_einsum{suffix}": {"w": lecun_normal(next(keys), out_shape, heads * head_dim)}
    }
    if heads == groups:  # openpi's layout without grouped queries
        shapes = {"qkv_einsum": (depth, 3, heads, width, head_dim)}
    else:
        shapes = {
            "q_einsum": (depth, heads, width, head_dim),
            "kv_einsum": (depth, 2, groups, width, head_dim),
        }
    for name, shape in shapes.items():
        tree[f"{name}{suffix}"] = {"w": lecun_normal(next(keys), shape, width)}
    return tree


def _init_norm(width: int, stack: tuple[int, ...], modulated: bool) -> dict:
    if not modulated:
        return {"scale": jnp.zeros((*stack, width))}
    kernel = jnp.zeros((*stack, width, 3 * width))
    return {"Dense_0": {"kernel": kernel, "bias": jnp.zeros((*stack, 3 * width))}}
