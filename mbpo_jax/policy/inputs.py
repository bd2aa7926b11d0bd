"""What the policy accepts: checks of an observation and its preparation for the model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.policy.config import Pi0Config
from mbpo_jax.types import Array, Observation, Prompt


def check(observation: Observation, config: Pi0Config, cameras: tuple[str, ...]) -> None:
    """Raises a ValueError that names the field if the policy cannot read `observation`.

    Shapes are always checked, values only where they are known (not under a JAX transformation).
    Fields that the policy does not read are not looked at.
    """
    for camera in cameras:
        _check_image(observation.images, camera, config)
    _check_prompt(observation.prompt, config)
    batch = observation.images[cameras[0]].shape[0]
    for name, size in (
        *((f"images[{camera!r}]", observation.images[camera].shape[0]) for camera in cameras),
        ("prompt.tokens", observation.prompt.tokens.shape[0]),
    ):
        if size != batch:
            raise ValueError(
                f"observation.{name} has batch size {size}, images[{cameras[0]!r}] has {batch}"
            )
    if config.use_proprio:
        _check_finite("observation.proprio", observation.proprio)


def images(observation: Observation, config: Pi0Config, cameras: tuple[str, ...]) -> jax.Array:
    """Frames of every camera as float32 [B, V, image_size, image_size, 3] in [-1, 1]."""
    frames = jnp.stack([observation.images[camera] for camera in cameras], axis=1)
    if jnp.issubdtype(frames.dtype, jnp.integer):
        frames = frames.astype(jnp.float32) / 127.5 - 1
    size = config.vision.image_size
    if frames.shape[2] != size:
        shape = (*frames.shape[:2], size, size, 3)
        frames = jax.image.resize(frames, shape, "bilinear")
    return frames


def prompt(observation: Observation, config: Pi0Config) -> Prompt:
    """The prompt, cut to the token budget (`check` has refused what may not be cut)."""
    budget = config.max_prompt_tokens
    return Prompt(observation.prompt.tokens[:, :budget], observation.prompt.mask[:, :budget])


def with_quality(prompt: Prompt, config: Pi0Config, quality: jax.Array, shown: jax.Array) -> Prompt:
    """The prompt with one more token that says how good the chunk to come is.

    The vocabulary's last ids are that token, the very last one for the best. `quality` [B] from 0
    to 1 is rounded to one of `config.quality_levels`; where `shown`, bool [B], is False the token
    is masked, so the policy is unconditional (π*0.6, arXiv 2511.14759, with two levels).
    """
    below_best = (config.quality_levels - 1) * (1.0 - jnp.clip(quality, 0.0, 1.0))
    token = config.vocab_size - 1 - jnp.round(below_best).astype(jnp.int32)
    return Prompt(
        jnp.concatenate([prompt.tokens, token[:, None]], axis=1),
        jnp.concatenate([prompt.mask, shown[:, None]], axis=1),
    )


def pad(x: jax.Array, action_dim: int, name: str) -> jax.Array:
    """Zero-pads the last axis to `action_dim`.

    Raises:
        ValueError: the axis is longer than that.
    """
    if x.shape[-1] > action_dim:
        raise ValueError(
            f"{name} has {x.shape[-1]} dimensions, the policy is padded to "
            f"action_dim={action_dim}: choose a config with action_dim >= {x.shape[-1]}"
        )
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, action_dim - x.shape[-1])])


def _check_image(frames: Mapping[str, Array], camera: str, config: Pi0Config) -> None:
    name = f"observation.images[{camera!r}]"
    if camera not in frames:
        raise ValueError(f"{name} is missing: the observation has {', '.join(sorted(frames))}")
    image, size = frames[camera], config.vision.image_size
    if image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"{name} has shape {image.shape}: expected [B, H, W, 3]")
    height, width = image.shape[1:3]
    if height != width:
        raise ValueError(f"{name} is {height} x {width} pixels: the policy reads square images")
    if height != size and not config.resize_images:
        raise ValueError(
            f"{name} is {height} x {width} pixels, the policy expects {size} x {size}: render at "
            "that size, or set resize_images=True"
        )
    if jnp.issubdtype(image.dtype, jnp.floating):
        _check_finite(name, image)
    elif image.dtype != jnp.uint8:
        raise ValueError(f"{name} is {image.dtype}: expected uint8, or float in [-1, 1]")


def _check_prompt(given: Prompt, config: Pi0Config) -> None:
    if given.tokens.ndim != 2 or given.tokens.shape != given.mask.shape:
        raise ValueError(
            f"observation.prompt has tokens {given.tokens.shape} and mask {given.mask.shape}: "
            "expected [B, L] both"
        )
    if given.tokens.shape[1] > config.max_prompt_tokens and not config.truncate_prompt:
        raise ValueError(
            f"observation.prompt has {given.tokens.shape[1]} token slots, the policy's budget is "
            f"{config.max_prompt_tokens}: raise max_prompt_tokens, or set truncate_prompt=True"
        )
    if _known(given.tokens):
        used = np.where(np.asarray(given.mask), np.asarray(given.tokens), 0)
        if used.size and (used.min() < 0 or used.max() >= config.vocab_size):
            wrong = int(used.max() if used.max() >= config.vocab_size else used.min())
            raise ValueError(
                f"observation.prompt has token id {wrong}, the vocabulary has {config.vocab_size}: "
                "tokenise with the policy's tokenizer"
            )


def _check_finite(name: str, x: Array) -> None:
    if _known(x) and not np.isfinite(np.asarray(x)).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(x)))[0])
        raise ValueError(f"{name} is not finite: the first bad value is at index {where}")


def _known(x: Array) -> bool:
    return not isinstance(x, jax.core.Tracer)
