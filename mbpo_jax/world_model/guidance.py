"""Classifier-free guidance of BAGEL's image generation (public code, `_forward_flow`): contexts,
combination and renormalisation of the three velocities."""

import jax.numpy as jnp
import numpy as np
from flax import struct

from mbpo_jax.nn.qwen2_mot import Cache
from mbpo_jax.shapes import Array, Float
from mbpo_jax.world_model.config import GuidanceConfig

RENORMS = ("global", "channel", "text_channel")


@struct.dataclass
class Contexts:
    """The prefixes that an image is denoised under.

    full: everything. text_free: without the last text, if no image came after it (otherwise equal
    to full). image_free: all texts and no image, with its own positions. The last two are None
    where guidance does not need them.
    """

    full: Cache
    text_free: Cache | None = None
    image_free: Cache | None = None


def is_active(config: GuidanceConfig, t: float) -> bool:
    """Whether guidance acts at the (shifted) flow time t, compared in float32."""
    low, high = np.float32(config.interval)
    return config.text_scale > 1 and low < np.float32(t) <= high


def combine(
    config: GuidanceConfig,
    full: Float[Array, "B n v"],
    text_free: Float[Array, "B n v"],
    image_free: Float[Array, "B n v"] | None = None,
) -> Float[Array, "B n v"]:
    """The guided velocity of tokens [B, n, v] from the velocities under the three contexts.

    Raises:
        ValueError: the renormalisation is unknown.
    """
    if config.renorm not in RENORMS:
        raise ValueError(f"Guidance renorm {config.renorm!r} is none of {', '.join(RENORMS)}.")
    if config.text_scale <= 1:
        return full
    guided = text_free + config.text_scale * (full - text_free)
    if config.renorm == "text_channel":
        guided = guided * _rescale(full, guided, (-1,), config.renorm_min)
    if config.image_scale > 1:
        guided = image_free + config.image_scale * (guided - image_free)
    if config.renorm != "text_channel":
        axes = (-2, -1) if config.renorm == "global" else (-1,)
        guided = guided * _rescale(full, guided, axes, config.renorm_min)
    return guided


def _rescale(reference, guided, axes, low):
    norm, guided_norm = (
        jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (reference, guided)
    )
    return jnp.clip(norm / (guided_norm + 1e-8), low, 1.0)
