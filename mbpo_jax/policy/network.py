"""The network of π0.5 (arXiv 2504.16054) and π0 (arXiv 2410.24164), in its own units.

Images and prompt become a prefix (`encode`); given a prefix, noisy chunks have a `velocity`.
Parameters are openpi's tree.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mbpo_jax.nn import gemma, siglip
from mbpo_jax.nn.layers import dense, linear
from mbpo_jax.policy.config import Pi0Config
from mbpo_jax.types import Prompt

TIME_PERIODS = (4e-3, 4.0)  # shortest and longest period of the time embedding's waves


@struct.dataclass
class Prefix:
    """An encoded observation.

    cache: the language model's keys and values, which the expert attends to.
    features: its mean hidden state over real tokens, float32 [B, D], which the critic reads; None
        if it was not asked for.
    state: padded proprioception [B, action_dim] for π0, None for π0.5.
    """

    cache: gemma.KVCache
    features: jax.Array | None
    state: jax.Array | None


def init(key: jax.Array, config: Pi0Config) -> dict:
    """Random float32 parameters of the network, in openpi's tree."""
    keys = jax.random.split(key, 8)
    width = config.expert.width
    tree = {
        "PaliGemma": {
            "img": siglip.init(keys[0], config.vision, config.language.width),
            "llm": gemma.init(
                keys[1], config.vocab_size, config.language, config.expert, config.pi05
            ),
        },
        "action_in_proj": dense(keys[2], config.action_dim, width),
        "action_out_proj": dense(keys[3], width, config.action_dim),
    }
    if config.pi05:
        tree["time_mlp_in"] = dense(keys[4], width, width)
        tree["time_mlp_out"] = dense(keys[5], width, width)
    else:
        tree["state_proj"] = dense(keys[4], config.action_dim, width)
        tree["action_time_mlp_in"] = dense(keys[5], 2 * width, width)
        tree["action_time_mlp_out"] = dense(keys[6], width, width)
    return tree


def for_inference(actor: dict, config: Pi0Config) -> dict:
    """The same network as it is read fastest where no gradient is computed; no output changes."""
    parts, dtype = actor["PaliGemma"], jnp.dtype(config.dtype)
    prepared = {
        "img": siglip.for_inference(parts["img"], dtype),
        "llm": gemma.for_inference(parts["llm"], dtype),
    }
    return {**actor, "PaliGemma": prepared}


def prefix_tokens(
    actor: dict,
    config: Pi0Config,
    images: jax.Array,
    image_mask: jax.Array,
    prompt: Prompt,
) -> tuple[jax.Array, jax.Array]:
    """Image tokens, camera by camera, then prompt tokens.

    Args:
        images: float32 [B, V, image_size, image_size, 3] in [-1, 1].
        image_mask: bool [B, V]; the tokens of a False camera are ignored by everything.

    Returns:
        Tokens [B, S, D] in the compute dtype and which of them are real, bool [B, S].
    """
    dtype = jnp.dtype(config.dtype)
    batch, views = images.shape[:2]
    flat = images.reshape(batch * views, *images.shape[2:])
    seen = siglip.encode(actor["PaliGemma"]["img"], config.vision, flat, dtype, config.layer_loop)
    seen = seen.reshape(batch, views * seen.shape[1], -1)
    words = gemma.embed(actor["PaliGemma"]["llm"], prompt.tokens).astype(dtype)
    image_mask = jnp.repeat(image_mask, config.vision.num_tokens, axis=1)
    mask = jnp.concatenate([image_mask, prompt.mask], axis=1)
    return jnp.concatenate([seen, words], axis=1), mask


def encode(
    actor: dict,
    config: Pi0Config,
    images: jax.Array,
    image_mask: jax.Array,
    prompt: Prompt,
    state: jax.Array | None,
    with_features: bool = True,
) -> Prefix:
    """The prefix of a batch of observations in the network's units; `state` [B, action_dim].

    Without features the last layer's attention and MLP are left out: actions do not depend on them.
    """
    tokens, mask = prefix_tokens(actor, config, images, image_mask, prompt)
    hidden, cache = gemma.encode_prefix(
        actor["PaliGemma"]["llm"], tokens, mask, config.layer_loop, not with_features
    )
    features = None
    if with_features:
        weight = mask[..., None].astype(jnp.float32)
        features = (hidden * weight).sum(1) / weight.sum(1)
    return Prefix(cache, features, state)


def time_embedding(times: jax.Array, width: int) -> jax.Array:
    """Sine-cosine features of flow times: float32 [*B] -> [*B, width], sines first."""
    shortest, longest = TIME_PERIODS
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    period = shortest * (longest / shortest) ** fraction
    angle = times[..., None] * (1.0 / period * 2 * jnp.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def time_condition(actor: dict, times: jax.Array, width: int) -> jax.Array:
    """What modulates π0.5's norms: [*B] -> [*B, width]."""
    hidden = jax.nn.silu(linear(actor["time_mlp_in"], time_embedding(times, width)))
    return jax.nn.silu(linear(actor["time_mlp_out"], hidden))


def at_times(actor: dict, config: Pi0Config, times: jax.Array):
    """All that depends on the flow time alone, which a sampler computes once for all its steps:
    times [*T] -> a tree of arrays [*T, ...] for `velocity`."""
    if config.pi05:
        condition = time_condition(actor, times, config.expert.width)
        return gemma.modulations(actor["PaliGemma"]["llm"], condition)
    return time_embedding(times, config.expert.width)


def velocity(
    actor: dict, config: Pi0Config, prefix: Prefix
) -> Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]:
    """The velocity of M noisy chunks per prefix, as a function `(x, time) -> (velocity, features)`
    that has prepared the expert's weights once for all its calls.

    x: float32 [B, M, k, action_dim]; time: `at_times` of flow times [B, M], or [1, M], the same
    for all. Velocity: float32 [B, M, k, action_dim]; features: the expert's last hidden states,
    float32 [B, M, k, W].
    """
    dtype, width = jnp.dtype(config.dtype), config.expert.width
    expert = actor["PaliGemma"]["llm"]
    layers = gemma.expert_layers(expert, config.layer_loop)

    def at(x: jax.Array, time) -> tuple[jax.Array, jax.Array]:
        steps = x.shape[2]
        tokens = linear(actor["action_in_proj"], x)
        attend = jnp.ones((steps, steps), bool)
        if not config.pi05:
            time = jnp.broadcast_to(time[..., None, :], tokens.shape)
            hidden = linear(actor["action_time_mlp_in"], jnp.concatenate([tokens, time], axis=-1))
            tokens = linear(actor["action_time_mlp_out"], jax.nn.silu(hidden))
            state = linear(actor["state_proj"], prefix.state)[:, None, None]
            state = jnp.broadcast_to(state, (*x.shape[:2], 1, width))
            tokens = jnp.concatenate([state, tokens], axis=2)
            # The state token sees the prefix and itself, never the noisy actions.
            attend = jnp.pad(attend, ((1, 0), (1, 0)), constant_values=True).at[0, 1:].set(False)
        hidden = gemma.denoise(
            expert,
            layers,
            tokens.astype(dtype),
            prefix.cache,
            time if config.pi05 else None,
            attend,
            config.layer_loop,
        )
        features = hidden[:, :, -steps:].astype(jnp.float32)
        return linear(actor["action_out_proj"], features), features

    return at
