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
import numpy as np
from flax import struct

from mbpo_jax.nn.layers import (
    SCAN,
    LayerLoop,
    lecun_normal,
    linear,
    lookup,
    matmul,
    rotary_table,
    rotate,
    softmax_average,
    unstack,
)

RMS_EPSILON = 1e-6
ROPE_WAVELENGTH = 10_000.0
NORMS = ("pre_attention_norm", "pre_ffw_norm")  # of every layer
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
    """Keys (after RoPE) and values of a prefix, [L, B, G, S, H] with L the layers; `mask` bool
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
        for name in NORMS:
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
    return lookup(table, tokens) * table.shape[-1] ** 0.5


def for_inference(params: dict, dtype: jnp.dtype) -> dict:
    """The same two transformers as they are read fastest where no gradient is computed: layers one
    by one, which nothing has to copy out of a stack, each with as few matrices as its products
    allow, in the products' `dtype`, so that no output changes."""
    stack = params["layers"]
    modulated = {name: norm for name, norm in stack.items() if "Dense_0" in norm}

    def layers(suffix: str) -> list[dict]:
        return [
            _cast_matrices(_prepared(layer), dtype) for layer in unstack(_member(stack, suffix))
        ]

    return {**params, "layers": {**modulated, "language": layers(""), "expert": layers("_1")}}


def encode_prefix(
    params: dict,
    tokens: jax.Array,
    mask: jax.Array,
    loop: LayerLoop = SCAN,
    cache_only: bool = False,
) -> tuple[jax.Array | None, KVCache]:
    """Runs the language model over a bidirectional prefix.

    Args:
        tokens: [B, S, D]; their dtype is the compute dtype.
        mask: bool [B, S]; positions count real tokens only.
        cache_only: stop after the last layer's keys and values, which is all that `denoise` reads.

    Returns:
        Hidden states after the final norm [B, S, D] (finite garbage where `mask` is False; None if
        `cache_only`), and the cache for `denoise`.
    """
    if "language" in params["layers"]:
        layers = params["layers"]["language"]
        depth, head_dim = len(layers), layers[0]["attn"]["out"].shape[-2]
        stack = [(layer, i == depth - 1) for i, layer in enumerate(layers)]
    else:
        layers = _member(params["layers"], "")
        depth, _, head_dim, _ = layers["attn"]["attn_vec_einsum"]["w"].shape
        stack = (layers, jnp.arange(depth) == depth - 1)
    rope = _rotation(jnp.cumsum(mask, axis=-1) - 1, head_dim, mask.shape[-1])
    attend = mask[:, :, None] & mask[:, None, :]

    def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weights, is_last = layer
        return _block(weights, x, rope, attend, stop_here=is_last if cache_only else False)

    x, (keys, values) = loop(block, tokens, stack)
    features = None if cache_only else _norm(params["final_norm"], x, None)[0]
    return features, KVCache(keys, values, mask)


def modulations(params: dict, condition: jax.Array) -> dict[str, jax.Array]:
    """What `condition` [*T, D] makes of the expert's adaptive norms, all layers at once: scale,
    shift and gate, [*T, L, 3 D] before attention and MLP and [*T, 3 D] at the end."""
    stacked = {name: params["layers"][f"{name}_1"]["Dense_0"] for name in NORMS}
    per_layer = {
        name: jax.vmap(linear, in_axes=(0, None), out_axes=-2)(weights, condition)
        for name, weights in stacked.items()
    }
    return {**per_layer, "final_norm": linear(params["final_norm_1"]["Dense_0"], condition)}


def expert_layers(params: dict, loop: LayerLoop = SCAN) -> dict | list[dict]:
    """The action expert's layers ready for their matrix products: a stack for a loop, one by one
    for an unrolled one. A sampler makes them once for all steps."""
    if "expert" in params["layers"]:
        return params["layers"]["expert"]
    stack = _member(params["layers"], "_1")
    if loop.unroll:
        return [_prepared(layer) for layer in unstack(stack)]
    return jax.vmap(_prepared)(stack)


def denoise(
    params: dict,
    layers: dict | list[dict],
    tokens: jax.Array,
    cache: KVCache,
    modulation: dict[str, jax.Array] | None,
    attend: jax.Array,
    loop: LayerLoop = SCAN,
) -> jax.Array:
    """Runs the action expert over M sets of tokens that share one prefix.

    Args:
        layers: `expert_layers`.
        tokens: [B, M, T, D]; the M sets do not see each other.
        modulation: `modulations` of conditions [B, M, D] (or [1, M, D], the same for all); None
            for plain norms (π0).
        attend: bool [T, T], query by key, attention of the expert's tokens to each other.

    Returns:
        Hidden states after the final norm, [B, M, T, D].
    """
    batch, sets, length, width = tokens.shape
    positions = cache.mask.sum(-1, dtype=jnp.int32)[:, None] + jnp.arange(length)
    count = cache.mask.shape[-1] + length
    rope = _rotation(jnp.tile(positions, (1, sets)), cache.keys.shape[-1], count)
    # All sets are one sequence with a block-diagonal mask: each layer is a few large products.
    same_set = jnp.repeat(jnp.repeat(jnp.eye(sets, dtype=bool), length, 0), length, 1)
    within = same_set & jnp.tile(attend, (sets, sets))

    def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
        weights, modulation, keys, values = layer
        context = (keys, values, cache.mask[:, None])
        x, _ = _block(weights, x, rope, within[None], modulation, context)
        return x, None

    x = tokens.reshape(batch, sets * length, width)
    modulation = dict(modulation or {})
    final = modulation.pop("final_norm", None)
    by_layer = jax.tree.map(lambda y: jnp.moveaxis(y, -2, 0), modulation)
    context = (by_layer, cache.keys, cache.values)
    if isinstance(layers, list):
        stack = [(layer, *its) for layer, its in zip(layers, unstack(context))]
    else:
        stack = (layers, *context)
    x, _ = loop(block, x, stack)
    features, _ = _norm(params["final_norm_1"], x, final)
    return features.reshape(tokens.shape)


def _member(layers: dict, suffix: str) -> dict:
    """The layers of one transformer of the pair, under names without its suffix."""
    attention = {
        name: layers["attn"][f"{name}{suffix}"]
        for name in ("q_einsum", "kv_einsum", "qkv_einsum", "attn_vec_einsum")
        if f"{name}{suffix}" in layers["attn"]
    }
    members = {name: layers[f"{name}{suffix}"] for name in ("mlp", *NORMS)}
    plain = {name: x for name, x in members.items() if "Dense_0" not in x}  # others: `modulations`
    return {"attn": attention} | plain


def _matrices(layer: dict) -> dict:
    """A layer with its attention as two matrices: queries, keys and values of all heads in one,
    [D, (N + 2 G) H], and the output, [N, H, D]. One that has them already is left as it is."""
    attention = layer["attn"]
    if "qkv" in attention:
        return layer
    heads = (
        [*attention["qkv_einsum"]["w"]]
        if "qkv_einsum" in attention
        else [attention["q_einsum"]["w"], *attention["kv_einsum"]["w"]]
    )
    out = attention["attn_vec_einsum"]["w"]  # [N, H, D]
    qkv = jnp.concatenate(heads).swapaxes(0, 1).reshape(out.shape[-1], -1)
    return {**layer, "attn": {"qkv": qkv, "out": out}}


def _prepared(layer: dict) -> dict:
    """`_matrices`, and the two gating matrices of the MLP as one, [D, 2 F]: where there are few
    tokens, a product costs more to start than to compute."""
    mlp = layer["mlp"]
    gating = jnp.concatenate([*mlp["gating_einsum"]], axis=1)
    return {**_matrices(layer), "mlp": {"gating": gating, "linear": mlp["linear"]}}


def _cast_matrices(layer: dict, dtype: jnp.dtype) -> dict:
    return layer | {
        part: {name: x.astype(dtype) for name, x in layer[part].items()} for part in ("attn", "mlp")
    }


def _gates(mlp: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves [B, T, F] of a gated MLP's hidden layer."""
    if "gating" in mlp:
        gated, plain = jnp.split(matmul(x, mlp["gating"]), 2, axis=-1)
        return gated, plain
    gated, plain = (matmul(x, kernel) for kernel in mlp["gating_einsum"])
    return gated, plain


def _block(weights, x, rope, attend, modulation=None, context=None, stop_here=False):
    """One layer over x [B, T, D]; also returns its own keys and values [B, G, T, H].

    `context`: earlier keys and values [B, G, S, H] and which of them to attend to, bool [B, 1, S];
    `attend`: bool [B or 1, T, T].
    `stop_here`: bool, or a bool scalar; True leaves x as it is.
    """
    modulation, weights = modulation or {}, _matrices(weights)
    normed, attention_gate = _norm(weights.get(NORMS[0]), x, modulation.get(NORMS[0]))
    query, key, value = _heads(weights["attn"], normed, rope)

    def rest(x: jax.Array) -> jax.Array:
        seen = [(key, value, attend)]
        if context is not None:
            seen.insert(0, context)
        x = x + _attention(weights["attn"], query, seen) * attention_gate
        normed, gate = _norm(weights.get(NORMS[1]), x, modulation.get(NORMS[1]))
        gated, plain = _gates(weights["mlp"], normed)
        hidden = jax.nn.gelu(gated, approximate=True) * plain
        return x + matmul(hidden, weights["mlp"]["linear"]) * gate

    if not isinstance(stop_here, bool):
        x = jax.lax.cond(stop_here, lambda x: x, rest, x)
    elif not stop_here:
        x = rest(x)
    return x, (key, value)


def _heads(weights, x, rope):
    """Rotated and scaled queries [B, N, T, H], rotated keys and values [B, G, T, H]."""
    queries, head_dim, _ = weights["out"].shape
    heads = matmul(x, weights["qkv"]).reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)
    groups = (heads.shape[1] - queries) // 2
    query, key, value = jnp.split(heads, (queries, queries + groups), axis=1)
    return rotate(query, *rope) * head_dim**-0.5, rotate(key, *rope), value


def _attention(weights, query, seen):
    """Grouped-query attention of query [B, N, T, H] -> [B, T, D]; `seen` are parts of (keys and
    values [B, G, K, H], bool [B or 1, T or 1, K]). Logits and softmax are float32."""
    batch, heads, length, head_dim = query.shape

    def masked_logits(keys, attend):
        groups, size = keys.shape[1:3]
        rows = query.reshape(batch, groups, -1, head_dim)  # the R heads of a group are more rows
        logits = jnp.einsum("bgqh,bgkh->bgqk", rows, keys, preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, groups, -1, length, size)
        logits = jnp.where(attend[:, None, None], logits, MASKED_LOGIT)
        return logits.reshape(batch, groups, -1, size)

    parts = [(masked_logits(keys, attend), values) for keys, values, attend in seen]
    mixed = softmax_average(*parts)
    mixed = mixed.reshape(batch, heads, length, head_dim).swapaxes(1, 2)
    return matmul(
        mixed.reshape(batch, length, -1), weights["out"].reshape(-1, weights["out"].shape[-1])
    )


def _rotation(positions: jax.Array, head_dim: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, 1, T, H / 2] of rotary positions [B, T] below `count`."""
    half = head_dim // 2
    wavelengths = np.float32(ROPE_WAVELENGTH) ** (np.arange(half, dtype=np.float32) / half)
    table = rotary_table(positions, 1 / wavelengths, count)
    return tuple(x[:, None] for x in table)


def _norm(weights: dict | None, x: jax.Array, modulation: jax.Array | None):
    """RMSNorm of x [B, T, D] and the gate of the branch that follows: plain (gate 1), or modulated
    (adaRMS) by `modulation` [B or 1, M, 3 D], each row for T / M consecutive tokens."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + RMS_EPSILON)
    if modulation is None:
        return (normed * (1 + weights["scale"])).astype(x.dtype), jnp.ones((), x.dtype)
    modulation = jnp.repeat(modulation, x.shape[1] // modulation.shape[1], axis=1)
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
