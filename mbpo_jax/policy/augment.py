"""Random crop, rotation and colour of camera frames, with openpi's ranges; jittable."""

import jax
import jax.numpy as jnp

CROP = 0.95  # side of the crop, in image sides
ROTATION = 5.0  # degrees, either way
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5  # factors 1 ± these
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def augment(images: jax.Array, key: jax.Array, still: tuple[bool, ...]) -> jax.Array:
    """Independent random views of every frame.

    Args:
        images: float32 [B, V, H, W, 3] in [-1, 1].
        still: for each view, whether its camera stands still. Only such a view is cropped and
            rotated: a wrist camera's frame of reference is the gripper, which this would move.
    """
    batch = images.shape[0]
    views = []
    for view, geometric in enumerate(still):
        move_key, colour_key = jax.random.split(jax.random.fold_in(key, view))
        frames = images[:, view]
        if geometric:
            frames = jax.vmap(_crop_and_rotate)(frames, jax.random.split(move_key, batch))
        views.append(jax.vmap(_jitter_colour)(frames, jax.random.split(colour_key, batch)))
    return jnp.stack(views, axis=1)


def _crop_and_rotate(image: jax.Array, key: jax.Array) -> jax.Array:
    """One bilinear resampling of image [H, W, 3]; beyond its edge the border is repeated."""
    offset_key, angle_key = jax.random.split(key)
    height, width, _ = image.shape
    limit = (1 - CROP) / 2
    offset = jax.random.uniform(offset_key, (2,), minval=-limit, maxval=limit)
    angle = jnp.deg2rad(jax.random.uniform(angle_key, minval=-ROTATION, maxval=ROTATION))
    rows = jnp.arange(height) + 0.5 - height / 2
    columns = jnp.arange(width) + 0.5 - width / 2
    y, x = jnp.meshgrid(rows, columns, indexing="ij")
    source_y = CROP * (jnp.cos(angle) * y + jnp.sin(angle) * x) + (0.5 + offset[0]) * height - 0.5
    source_x = CROP * (jnp.cos(angle) * x - jnp.sin(angle) * y) + (0.5 + offset[1]) * width - 0.5

    def resample(channel: jax.Array) -> jax.Array:
        coordinates = [source_y, source_x]
        return jax.scipy.ndimage.map_coordinates(channel, coordinates, order=1, mode="nearest")

    return jax.vmap(resample, in_axes=-1, out_axes=-1)(image)


def _jitter_colour(image: jax.Array, key: jax.Array) -> jax.Array:
    """Scales brightness, contrast about the mean, and saturation about grey."""
    ranges = jnp.array([BRIGHTNESS, CONTRAST, SATURATION])
    brightness, contrast, saturation = 1 + ranges * jax.random.uniform(key, (3,), minval=-1.0)
    x = (image + 1) / 2 * brightness
    x = x.mean() + contrast * (x - x.mean())
    grey = (x @ jnp.array(LUMA))[..., None]
    x = grey + saturation * (x - grey)
    return jnp.clip(x, 0, 1) * 2 - 1
