"""BAGEL's picture preprocessing on the host, for pictures of any size (public code,
`MaxLongEdgeMinShortEdgeResize`)."""

import numpy as np


def resized_shape(
    width: int,
    height: int,
    max_size: int,
    min_size: int,
    stride: int,
    max_pixels: int,
    num_images: int = 1,
) -> tuple[int, int]:
    """(width, height) after resizing: multiples of `stride`, long side at most `max_size`, short
    side at least `min_size` (which wins), area at most max_pixels / num_images."""

    def scaled(w, h, scale):
        sides = (max(stride, round(round(side * scale) / stride) * stride) for side in (w, h))
        return tuple(sides)

    scale = min(max_size / max(width, height), 1.0)
    scale = max(scale, min_size / min(width, height))
    width, height = scaled(width, height, scale)
    # The ratio of areas scales the sides, as in the public code.
    if width * height > max_pixels / num_images:
        width, height = scaled(width, height, max_pixels / num_images / (width * height))
    if max(width, height) > max_size:
        width, height = scaled(width, height, max_size / max(width, height))
    return width, height


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3] resized by antialiased bicubic interpolation on bytes."""
    from PIL import Image

    # Rows first, then columns: Pillow 13 picks the cheaper order, earlier versions always this one,
    # and the bytes in between are rounded.
    bicubic, picture = Image.Resampling.BICUBIC, Image.fromarray(image)
    return np.asarray(
        picture.resize((width, picture.height), bicubic).resize((width, height), bicubic)
    )
