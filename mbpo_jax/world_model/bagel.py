"""BAGEL as one model (arXiv 2505.14683): text, ViT and VAE tokens as segments of the decoder, and
the heads that read images and answers back.

Parameters: {"mot", "vit", "adapters", "position_tables"}. Letters as in `nn.qwen2_mot`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn import navit, qwen2_mot
from mbpo_jax.nn.layers import dense, linear
from mbpo_jax.nn.qwen2_mot import Cache, Segment
from mbpo_jax.shapes import Array, Bool, Float, Int
from mbpo_jax.world_model.config import UMMConfig

Params = Any
TIME_FEATURES = 256


class Tokenizer(Protocol):
    """What the model needs of a tokenizer; ids are below `vocab_size`."""

    bos_id: int
    eos_id: int
    start_of_image_id: int
    end_of_image_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...


def init(config: UMMConfig, action_dim: int, key: Array) -> Params:
    """Fresh weights; the heads that read images and proprioception are zero, so a first prediction
    is zero."""
    adapter_key, mot_key, vit_key = jax.random.split(key, 3)
    d = config.mot.hidden_size
    return {
        "mot": qwen2_mot.init(config.mot, mot_key),
        "vit": navit.init(config.vit, vit_key),
        "adapters": init_adapters(config, action_dim, adapter_key),
        "position_tables": {
            "latent": jnp.asarray(position_table(config.max_latent_side, d)),
            "vit": jnp.asarray(position_table(config.vit.max_patches_per_side, d)),
        },
    }


def init_adapters(config: UMMConfig, action_dim: int, key: Array) -> Params:
    """Fresh weights of everything between the decoder and what it reads and predicts."""
    d, token = config.mot.hidden_size, config.token_size
    keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def zero_head(values):
        return {"kernel": jnp.zeros((d, values)), "bias": jnp.zeros(values)}

    adapters = {
        "connector": {
            "fc1": dense(next(keys), config.vit.hidden_size, d),
            "fc2": dense(next(keys), d, d),
        },
        "time_embedder": {
            "fc1": dense(next(keys), TIME_FEATURES, d),
            "fc2": dense(next(keys), d, d),
        },
    }
    if config.prediction != "composed":
        adapters["vae2llm"] = dense(next(keys), token, d)
        adapters["llm2vae"] = zero_head(token)
    if config.actions_as == "embedding":
        adapters["action2llm"] = dense(next(keys), action_dim, d)
    if config.proprio_dim:
        adapters["proprio2llm"] = dense(next(keys), config.proprio_dim, d)
        adapters["llm2proprio"] = zero_head(config.proprio_dim)
    return adapters


def position_table(side: int, width: int) -> Float[np.ndarray, "cells width"]:
    """Sin-cos table [side * side, width], row-major cells.

    The first half of the channels encodes the column, the second the row; each half is [sin | cos]
    with frequencies 10000^(-i / (width / 4)).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def time_features(t: Float[Array, "*B"]) -> Float[Array, "*B features"]:
    """[cos | sin] of t * 10000^(-i/128); flow time in [0, 1], not multiplied by 1000."""
    half = TIME_FEATURES // 2
    angles = t[..., None] * (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def embed_time(params: Params, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
    """Flow-time embedding: Linear, SiLU, Linear."""
    weights = params["adapters"]["time_embedder"]
    return linear(weights["fc2"], jax.nn.silu(linear(weights["fc1"], time_features(t))))


def _no_gen(und):
    return jnp.zeros((und.shape[0], 0, und.shape[2]), und.dtype)


def markers(
    params: Params, config: UMMConfig, tokenizer: Tokenizer, batch: int
) -> Float[Array, "B 2 D"]:
    """Embeddings of what stands before and behind a picture, for each of `batch` rows."""
    ids = jnp.asarray([tokenizer.start_of_image_id, tokenizer.end_of_image_id])
    embedded = qwen2_mot.embed_text(params["mot"], config.mot, ids)
    return jnp.broadcast_to(embedded, (batch, *embedded.shape))


def text_segment(
    params: Params,
    config: UMMConfig,
    ids: Int[Array, "B n"],
    valid: Bool[Array, "B n"] | None = None,
) -> Segment:
    """A text, read causally; `ids` include its bos and eos, and count only where `valid`."""
    und = qwen2_mot.embed_text(params["mot"], config.mot, ids)
    return Segment(und, _no_gen(und), valid, "causal")


def action_segment(
    params: Params, config: UMMConfig, tokenizer: Tokenizer, actions: Float[Array, "B k A"]
) -> Segment:
    """A chunk as embedded vectors, one token per step, between bos and eos."""
    steps = linear(params["adapters"]["action2llm"], actions).astype(config.mot.dtype)
    ends = qwen2_mot.embed_text(
        params["mot"], config.mot, jnp.asarray([tokenizer.bos_id, tokenizer.eos_id])
    )
    ends = jnp.broadcast_to(ends, (actions.shape[0], *ends.shape))
    und = jnp.concatenate([ends[:, :1], steps, ends[:, 1:]], axis=1)
    return Segment(und, _no_gen(und), None, "causal")


def proprio_segment(params: Params, config: UMMConfig, proprio: Float[Array, "B P"]) -> Segment:
    """Standardised proprioception as one token, whose hidden state `read_proprio` reads."""
    und = linear(params["adapters"]["proprio2llm"], proprio)[:, None].astype(config.mot.dtype)
    return Segment(und, _no_gen(und), None, "causal")


def vit_segment(
    params: Params,
    config: UMMConfig,
    tokenizer: Tokenizer,
    features: Float[Array, "B n F"],
    rows: int,
    columns: int,
) -> Segment:
    """A picture as ViT tokens between its markers; `features` come from `navit.forward`."""
    ids = navit.grid_ids(rows, columns, config.vit.max_patches_per_side)
    x = connect(params, config, features, ids)
    marks = markers(params, config, tokenizer, x.shape[0])
    und = jnp.concatenate([marks[:, :1], x, marks[:, 1:]], axis=1)
    return Segment(und, _no_gen(und), None, "full")


def connect(
    params: Params, config: UMMConfig, features: Float[Array, " B n F"], ids: Int[Array, " n"]
) -> Float[Array, "B n D"]:
    """ViT features in the decoder's width, with the position of their cells in the grid."""
    weights = params["adapters"]["connector"]
    x = jax.nn.gelu(linear(weights["fc1"], features), approximate=True)
    x = linear(weights["fc2"], x).astype(config.mot.dtype)
    return x + params["position_tables"]["vit"][ids].astype(x.dtype)


def embed_latents(
    params: Params,
    config: UMMConfig,
    tokens: Float[Array, "B n v"],
    ids: Int[Array, " n"],
    t: Float[Array, "*B"],
) -> Float[Array, "B n D"]:
    """Latent tokens in the decoder's width, float32, with the position of their cells in the grid
    and their flow time (0 for clean ones), which broadcasts against [B, n]."""
    x = linear(params["adapters"]["vae2llm"], tokens) + embed_time(params, t)
    return x + params["position_tables"]["latent"][ids]


def latent_segment(
    params: Params,
    config: UMMConfig,
    tokenizer: Tokenizer,
    tokens: Float[Array, "B n v"],
    rows: int,
    columns: int,
    t: Float[Array, " B"] | None = None,
) -> Segment:
    """A picture as VAE tokens between its markers.

    Args:
        tokens: clean latent tokens, or noised ones of flow time `t`.
        t: None for a clean condition image (embedded as time 0).
    """
    ids = navit.grid_ids(rows, columns, config.max_latent_side)
    time = jnp.zeros(tokens.shape[:1]) if t is None else t
    x = embed_latents(params, config, tokens, ids, time[:, None])
    x = x.astype(config.mot.dtype)
    attention = "full" if t is None else "noise"
    return Segment(markers(params, config, tokenizer, x.shape[0]), x, None, attention)


def read_latents(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B v"]:
    """The prediction for latent tokens, float32, from generation tokens after the final norm."""
    return linear(params["adapters"]["llm2vae"], hidden.astype(jnp.float32))


def read_proprio(params: Params, hidden: Float[Array, "B D"]) -> Float[Array, "B P"]:
    """The predicted change of proprioception, float32, in the units of its statistics."""
    return linear(params["adapters"]["llm2proprio"], hidden.astype(jnp.float32))


def extend(
    params: Params, config: UMMConfig, segments: Sequence[Segment], cache: Cache
) -> tuple[Cache, Array, Array]:
    """`qwen2_mot.extend`, segment by segment appended to the prefix `cache` in one pass."""
    return qwen2_mot.extend(params["mot"], config.mot, segments, cache)


def forward(
    params: Params, config: UMMConfig, segments: Sequence[Segment], *caches: Cache
) -> tuple[Array, Array]:
    """`qwen2_mot.forward`, by default without a prefix."""
    caches = caches or (qwen2_mot.empty_cache(config.mot, segments[0].und.shape[0]),)
    return qwen2_mot.forward(params["mot"], config.mot, segments, *caches)
