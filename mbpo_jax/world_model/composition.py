"""Views as pixel patches, and the next picture of a view as a composition of three: the current
one, the current one moved by a coarse flow, and newly painted pixels, mixed by a softmax per pixel.

A small model trained from scratch in minutes cannot afford latents: an autoencoder blurs what it
must tell apart, and a residual to the current picture leaves outlines of whatever moves away. A
mask does not (cf. video prediction by motion masks, arXiv 1605.07157). For every patch of p x p
pixels the network gives [new: p*p*3 | mask logits: p*p*3 | flow: 2].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mbpo_jax.nn import navit
from mbpo_jax.nn.layers import dense
from mbpo_jax.shapes import Array, Float
from mbpo_jax.types import Params

# Fresh logits of (current, moved, new): nearly nothing is painted anew.
_FRESH_LOGITS = (1.5, 1.5, -1.5)


def output_size(patch: int) -> int:
    """Values that the network gives for every patch of `patch` x `patch` pixels."""
    return 6 * patch**2 + 2


def init(key: Array, cameras: Sequence[str], patch: int, width: int) -> Params:
    """Per camera a projection "in" of its patches to the model's width and a head "out", zero: a
    fresh model copies the current picture."""
    return {
        camera: {
            "in": dense(jax.random.fold_in(key, i), 3 * patch**2, width),
            "out": {
                "kernel": jnp.zeros((width, output_size(patch))),
                "bias": jnp.zeros(output_size(patch)),
            },
        }
        for i, camera in enumerate(cameras)
    }


def warp(picture: Float[Array, "B H W 3"], flow: Float[Array, "B H W 2"]) -> Array:
    """`picture` read at every pixel's place plus `flow` (rows, columns; in pixels), bilinear; what
    lies outside is the nearest border pixel."""
    b, height, width, _ = picture.shape
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y = jnp.clip(rows + flow[..., 0], 0.0, height - 1.0)
    x = jnp.clip(columns + flow[..., 1], 0.0, width - 1.0)
    top = jnp.clip(jnp.floor(y), 0, height - 2).astype(jnp.int32)
    left = jnp.clip(jnp.floor(x), 0, width - 2).astype(jnp.int32)
    down, right = (y - top)[..., None], (x - left)[..., None]
    flat = picture.reshape(b, height * width, 3)

    def at(row, column):
        index = (row * width + column).reshape(b, -1, 1)
        return jnp.take_along_axis(flat, index, axis=1).reshape(picture.shape)

    upper = (1 - right) * at(top, left) + right * at(top, left + 1)
    lower = (1 - right) * at(top + 1, left) + right * at(top + 1, left + 1)
    return (1 - down) * upper + down * lower


def compose(
    output: Float[Array, "B n v"], current: Float[Array, "B H W 3"], patch: int
) -> Float[Array, "B H W 3"]:
    """The next picture of a view.

    Args:
        output: the network's values for every patch (`output_size`); the flow counts in patches and
            is interpolated between their centres.
        current: pixels in [-1, 1].
    """
    side, values = current.shape[1] // patch, 3 * patch**2
    new, logits, flow = jnp.split(output.astype(jnp.float32), [values, 2 * values], axis=-1)
    new, logits = (navit.unpatchify(x, side, side, patch) for x in (new, logits))
    flow = patch * flow.reshape(len(flow), side, side, 2)
    flow = jax.image.resize(flow, (*current.shape[:3], 2), "bilinear")
    mask = jax.nn.softmax(logits + jnp.asarray(_FRESH_LOGITS), axis=-1)
    kept, moved, painted = jnp.split(mask, 3, axis=-1)
    return kept * current + moved * warp(current, flow) + painted * new


def augment(
    pictures: Sequence[Float[Array, "B H W 3"]], key: Array, shift: int, colour: float
) -> list[Float[Array, "B H W 3"]]:
    """Pictures of one view at several times, all changed alike: moved by up to `shift` pixels each
    way (borders are repeated), colours scaled and moved by up to `colour`."""
    b, height, width, _ = pictures[0].shape
    move_key, gain_key, offset_key = jax.random.split(key, 3)
    if shift:
        corner = jax.random.randint(move_key, (b, 2), 0, 2 * shift + 1)

        def moved(x, start):
            x = jnp.pad(x, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
            return jax.lax.dynamic_slice(x, (start[0], start[1], 0), (height, width, 3))

        pictures = [jax.vmap(moved)(x, corner) for x in pictures]
    if colour:
        gain = 1.0 + colour * jax.random.uniform(gain_key, (b, 1, 1, 3), minval=-1.0)
        offset = colour * jax.random.uniform(offset_key, (b, 1, 1, 1), minval=-1.0)
        pictures = [jnp.clip(gain * x + offset, -1.0, 1.0) for x in pictures]
    return list(pictures)
