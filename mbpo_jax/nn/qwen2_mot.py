"""The Qwen2 Mixture-of-Transformers decoder of BAGEL (arXiv 2505.14683, section 2).

Every layer holds two complete sets of weights: `und` for understanding tokens (text, image markers,
ViT tokens) and `gen` for generation tokens (VAE latents). All tokens share one attention.

A sequence is a list of `Segment`s. Tokens of the two experts are kept in two separate arrays for
the whole forward pass, so each expert is computed on its own tokens only; their order lives in the
RoPE positions and in the attention mask, which attention alone consults. The layout (which segment
has how many tokens of which kind) is static; padding inside a segment is a traced mask.

Letters: B batch, T query tokens, S key tokens, D hidden size, N heads, K key/value heads,
G = N/K query heads per key/value head, H head size, L layers.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mbpo_jax.nn.layers import (
    LayerLoop,
    gathered,
    linear,
    lookup,
    rotary_table,
    rotate,
    softmax_average,
)
from mbpo_jax.shapes import Array, Bool, Float, Int

Params = Any
EXPERTS = ("und", "gen")


@dataclasses.dataclass(frozen=True)
class MoTConfig:
    """Sizes of the decoder."""

    vocab_size: int  # rows of the token embedding and of the untied head
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # grouped-query attention: divides num_heads
    mlp_size: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of activations and matmuls; norms, rotations and softmax are float32
    remat: bool = False  # recompute each layer's activations in the backward pass
    unroll: bool = False  # unroll the loop over layers: faster to train small models on a CPU

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def layer_loop(self) -> LayerLoop:
        return LayerLoop(remat=self.remat, unroll=self.unroll)


@struct.dataclass
class Segment:
    """A run of tokens that attend to one another in one way.

    und: [B, n, D] embedded understanding tokens in order; gen: [B, m, D] generation tokens.
    valid: bool [B, n], False where `und` is padding; None when nothing is.
    attention: "causal" (text: each token sees itself and what came before), "full" (a condition
        image: bidirectional inside), "noise" (an image being denoised: bidirectional inside, seen
        by nothing outside). Every segment sees the earlier ones that are not "noise".
    """

    und: Float[Array, "B n D"]
    gen: Float[Array, "B m D"]
    valid: Bool[Array, "B n"] | None
    attention: str = struct.field(pytree_node=False)


@struct.dataclass
class Cache:
    """Keys (after norm and rotation) and values of a finished prefix.

    keys, values: [L, B, K, S, H]; valid: bool [B, S]; position: int32 [B], the next RoPE position.
    """

    keys: Array
    values: Array
    valid: Array
    position: Array


def init(config: MoTConfig, key: Array) -> Params:
    """Fresh weights: unit-variance embeddings, fan-in scaled matrices, zero biases."""
    d, h, f = config.hidden_size, config.head_dim, config.mlp_size
    keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def matrix(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    def expert():
        n = config.num_layers
        heads, kv = config.num_heads * h, config.num_kv_heads * h
        return {
            "input_layernorm": {"scale": jnp.ones((n, d))},
            "self_attn": {
                "q_proj": {"kernel": matrix(n, d, heads), "bias": jnp.zeros((n, heads))},
                "k_proj": {"kernel": matrix(n, d, kv), "bias": jnp.zeros((n, kv))},
                "v_proj": {"kernel": matrix(n, d, kv), "bias": jnp.zeros((n, kv))},
                "o_proj": {"kernel": matrix(n, heads, d)},
                "q_norm": {"scale": jnp.ones((n, h))},
                "k_norm": {"scale": jnp.ones((n, h))},
            },
            "post_attention_layernorm": {"scale": jnp.ones((n, d))},
            "mlp": {
                "gate_proj": {"kernel": matrix(n, d, f)},
                "up_proj": {"kernel": matrix(n, d, f)},
                "down_proj": {"kernel": matrix(n, f, d)},
            },
        }

    return {
        "embed_tokens": {"embedding": jax.random.normal(next(keys), (config.vocab_size, d))},
        "layers": {name: expert() for name in EXPERTS},
        "norm": {name: {"scale": jnp.ones(d)} for name in EXPERTS},
        "lm_head": {"kernel": matrix(d, config.vocab_size)},
    }


def embed_text(params: Params, config: MoTConfig, ids: Int[Array, "*B n"]) -> Array:
    """Token embeddings [*B, n, D]."""
    return lookup(params["embed_tokens"]["embedding"], ids).astype(config.dtype)


def logits(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
    """Next-token logits in float32, from understanding tokens after the final norm."""
    kernel = gathered(params["lm_head"]["kernel"].astype(hidden.dtype))
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def rope_angles(
    positions: Int[Array, "*B n"], head_dim: int, theta: float, count: int
) -> tuple[Array, Array]:
    """cos and sin [*B, n, head_dim/2] of position * theta^(-2i/head_dim); positions < `count`."""
    return rotary_table(positions, theta ** (-np.arange(0, head_dim, 2) / head_dim), count)


def attention_mask(segments: Sequence[Segment]) -> np.ndarray:
    """Static mask [T, T], query row may see key column; all und tokens come first, then all gen."""
    index, order, causal, noise = [], [], [], []
    for stream in EXPERTS:
        for i, segment in enumerate(segments):
            n = getattr(segment, stream).shape[1]
            index += [i] * n
            order += range(n)
            causal += [segment.attention == "causal"] * n
            noise += [segment.attention == "noise"] * n
    index, order, causal, noise = map(np.asarray, (index, order, causal, noise))
    earlier = (index[None, :] < index[:, None]) & ~noise[None, :]
    own = index[None, :] == index[:, None]
    return earlier | (own & (~causal[:, None] | (order[None, :] <= order[:, None])))


def segment_positions(
    segments: Sequence[Segment], start: Int[Array, " B"]
) -> tuple[Int[Array, " B T"], Int[Array, " B"]]:
    """RoPE positions in the order of `attention_mask`, and the next free position.

    Text advances by one per token; all tokens of an image share one position, which the image then
    uses up, unless it is being denoised.
    """
    und, gen = [], []
    for segment in segments:
        batch, n = segment.und.shape[:2]
        if segment.attention == "causal":
            valid = jnp.ones((batch, n), bool) if segment.valid is None else segment.valid
            count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
            und.append(start[:, None] + count - 1)
            start = start + count[:, -1]
        else:
            m = segment.gen.shape[1]
            und.append(jnp.broadcast_to(start[:, None], (batch, n)))
            gen.append(jnp.broadcast_to(start[:, None], (batch, m)))
            start = start + (segment.attention == "full")
    return jnp.concatenate([*und, *gen], axis=1), start


def empty_cache(config: MoTConfig, batch: int) -> Cache:
    """The cache of a prefix with no tokens; the next position is 0."""
    kv = jnp.zeros(
        (config.num_layers, batch, config.num_kv_heads, 0, config.head_dim), config.dtype
    )
    return Cache(kv, kv, jnp.zeros((batch, 0), bool), jnp.zeros((batch,), jnp.int32))


def forward(
    params: Params, config: MoTConfig, segments: Sequence[Segment], *caches: Cache
) -> tuple[Array, Array]:
    """Hidden states after the final norms, (und [B, Tu, D], gen [B, Tg, D]), segments in order.

    Several caches belong to as many groups of rows in order: every matrix is multiplied once with
    all rows, and each group attends to its own cache, whatever the length of the others.
    """
    und, gen, _, _ = _run(params, config, segments, caches, collect=False)
    return und, gen


def extend(
    params: Params, config: MoTConfig, segments: Sequence[Segment], cache: Cache
) -> tuple[Cache, Array, Array]:
    """`forward`, and the cache with `segments` appended (und tokens, then gen tokens).

    Raises:
        ValueError: a "noise" segment is among them; nothing may see a noised image afterwards.
    """
    if any(s.attention == "noise" for s in segments):
        raise ValueError("A noised image never enters the cache: pass it to `forward` instead.")
    und, gen, new, position = _run(params, config, segments, [cache], collect=True)
    cache = Cache(
        keys=jnp.concatenate([cache.keys, new[0]], axis=3),
        values=jnp.concatenate([cache.values, new[1]], axis=3),
        valid=jnp.concatenate([cache.valid, _valid(segments)], axis=1),
        position=position,
    )
    return cache, und, gen


def layer_outputs(
    params: Params, config: MoTConfig, segments: Sequence[Segment], cache: Cache
) -> tuple[Array, Array]:
    """Hidden states after every layer, before the final norm: und [L, B, Tu, D] and gen."""
    x, layer, scanned, _ = _prepare(params, config, segments, [cache], collect=False)
    _, hidden = config.layer_loop(lambda x, w: (layer(x, w)[0],) * 2, x, scanned)
    return hidden


def _valid(segments):
    und = [jnp.ones(s.und.shape[:2], bool) if s.valid is None else s.valid for s in segments]
    gen = [jnp.ones(s.gen.shape[:2], bool) for s in segments]
    return jnp.concatenate(und + gen, axis=1)


def _prepare(params, config, segments, caches, collect):
    x = tuple(jnp.concatenate([getattr(s, e) for s in segments], axis=1) for e in EXPERTS)
    lengths = [stream.shape[1] for stream in x]
    start = jnp.concatenate([cache.position for cache in caches])
    positions, position = segment_positions(segments, start)
    longest = max(cache.valid.shape[1] for cache in caches)
    count = longest + positions.shape[1]  # of positions: there are fewer than tokens
    angles = rope_angles(positions, config.head_dim, config.rope_theta, count)
    cos, sin = (x[:, :, None] for x in angles)  # the same for all heads

    visible = jnp.asarray(attention_mask(segments))[None] & _valid(segments)[:, None, :]
    # A padded text token in front of an empty cache would see nothing and turn into NaN.
    past = jnp.concatenate([cache.valid.any(1, keepdims=True) for cache in caches])
    nothing = ~visible.any(2) & ~past
    bias = jnp.where(visible | nothing[..., None], 0.0, -jnp.inf)
    past_biases = [jnp.where(cache.valid, 0.0, -jnp.inf)[:, None] for cache in caches]
    groups = np.cumsum([len(cache.position) for cache in caches])[:-1]

    def layer(x, scanned):
        weights, pasts = scanned
        q, k, v = (
            jnp.concatenate(parts, axis=1)
            for parts in zip(*[_qkv(weights[e], s, config) for e, s in zip(EXPERTS, x)])
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        grouped = zip(*[jnp.split(y, groups) for y in (q, k, v, bias)], pasts, past_biases)
        mixed = []
        for q_group, *new, (keys, values), past_bias in grouped:
            past = (keys.astype(k.dtype), values.astype(v.dtype), past_bias)
            mixed.append(_attention(q_group, [past, new] if keys.shape[2] else [new]))
        mixed = jnp.split(jnp.concatenate(mixed), [lengths[0]], axis=1)
        x = tuple(_finish(weights[e], s, m, config) for e, s, m in zip(EXPERTS, x, mixed))
        return x, ((k, v) if collect else None)

    pasts = [(cache.keys, cache.values) for cache in caches]
    return x, layer, (params["layers"], pasts), position


def _run(params, config, segments, caches, collect):
    x, layer, scanned, position = _prepare(params, config, segments, caches, collect)
    (und, gen), new = config.layer_loop(layer, x, scanned)
    und = rms_norm(und, params["norm"]["und"]["scale"], config.norm_eps)
    gen = rms_norm(gen, params["norm"]["gen"]["scale"], config.norm_eps)
    return und, gen, new, position


def _qkv(weights, x, config):
    attn = weights["self_attn"]
    x = rms_norm(x, weights["input_layernorm"]["scale"], config.norm_eps)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    heads["v_proj"] = config.num_kv_heads
    q, k, v = (
        linear(attn[name], x).reshape(*x.shape[:2], n, config.head_dim) for name, n in heads.items()
    )
    q = rms_norm(q, attn["q_norm"]["scale"], config.norm_eps)
    k = rms_norm(k, attn["k_norm"]["scale"], config.norm_eps)
    return q, k, v


def _attention(q, seen):
    """Attention of q [B, T, N, H] -> [B, T, N * H]; `seen` are parts of (keys and values
    [B, K, S, H], bias [B, T or 1, S])."""
    batch, length, heads, size = q.shape
    kv_heads = seen[0][0].shape[1]
    groups = heads // kv_heads
    # Query heads that share a key head are more rows of one product.
    q = q.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, groups * length, size) * size**-0.5

    def biased_scores(k, bias):
        scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, groups, length, -1) + bias[:, None, None]
        return scores.reshape(batch, kv_heads, groups * length, -1)

    mixed = softmax_average(*[(biased_scores(k, bias), v) for k, v, bias in seen])
    mixed = mixed.reshape(batch, -1, groups, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * size)


def _finish(weights, x, mixed, config):
    x = x + linear(weights["self_attn"]["o_proj"], mixed)
    y = rms_norm(x, weights["post_attention_layernorm"]["scale"], config.norm_eps)
    mlp = weights["mlp"]
    y = jax.nn.silu(linear(mlp["gate_proj"], y)) * linear(mlp["up_proj"], y)
    return x + linear(mlp["down_proj"], y)
