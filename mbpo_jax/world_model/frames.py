"""What imagination keeps of a view, and batches with any number of leading axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mbpo_jax.shapes import Array
from mbpo_jax.types import Observation


@struct.dataclass
class Frame:
    """One view at one time, ready to condition on.

    pixels: [B, H, W, 3] in [-1, 1]; tokens: clean latent tokens [B, n, v], None where views are
    composed of pixels; features: ViT features [B, m, F], None until something needs them.
    """

    pixels: Array
    tokens: Array | None
    features: Array | None


def check_views(images: Mapping[str, Array], cameras: Sequence[str], size: int) -> None:
    """Raises ValueError where `images` are not of these cameras, [*B, size, size, 3] each."""
    missing = [c for c in cameras if c not in images]
    unknown = [c for c in images if c not in cameras]
    if missing or unknown:
        raise ValueError(
            f"The world model's views are {list(cameras)}; the observation lacks "
            f"{missing} and has the unknown {unknown}."
        )
    for camera, image in images.items():
        if image.shape[-3:] != (size, size, 3):
            expected = (size, size, 3)
            raise ValueError(f"Image {camera!r} is {image.shape[-3:]}, expected {expected}.")


def flatten(first: Any, *rest: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The shape of the first tree's batch axes, and all trees with those axes as one."""
    observation = first if isinstance(first, Observation) else first.observation
    batch = jnp.shape(next(iter(observation.images.values())))[:-3]
    size = math.prod(batch)

    def flat(x):
        return jnp.reshape(x, (size, *jnp.shape(x)[len(batch) :]))

    return batch, jax.tree.map(flat, (first, *rest))


def restore(tree: Any, batch: tuple[int, ...]) -> Any:
    """Undoes `flatten` for one tree."""
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), tree)
