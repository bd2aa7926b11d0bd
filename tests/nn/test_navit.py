"""ViT patches and position ids (golden values: tests/world_model)."""

import jax
import numpy as np
import pytest

from mbpo_jax.nn import navit
from mbpo_jax.nn.navit import NaViTConfig

CONFIG = NaViTConfig(8, 1, 2, 16, patch_size=2, max_patches_per_side=4)


def test_patches_are_row_major_with_channels_fastest():
    # Pixel value = 100 row + 10 column + channel.
    rows, columns, channels = np.meshgrid(range(4), range(4), range(2), indexing="ij")
    image = (100.0 * rows + 10 * columns + channels).astype(np.float32)[None]
    patches = navit.patchify(image, 2)
    assert patches.shape == (1, 4, 8)
    np.testing.assert_array_equal(patches[0, 1], [20, 21, 30, 31, 120, 121, 130, 131])


def test_grid_ids_count_the_grid_not_the_picture():
    np.testing.assert_array_equal(navit.grid_ids(2, 3, 4), [0, 1, 2, 4, 5, 6])
    with pytest.raises(ValueError, match="5x1 tokens exceeds the 4x4 grid"):
        navit.grid_ids(5, 1, 4)


def test_size_that_is_no_multiple_of_the_patch():
    params = navit.init(CONFIG, jax.random.key(0))
    assert navit.forward(params, CONFIG, np.zeros((1, 4, 6, 3), np.float32)).shape == (1, 6, 8)
    with pytest.raises(ValueError, match="multiples of 2"):
        navit.forward(params, CONFIG, np.zeros((1, 5, 6, 3), np.float32))
