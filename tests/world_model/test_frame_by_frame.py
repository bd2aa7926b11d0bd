import jax
import numpy as np

from mbpo_jax import toy
from mbpo_jax.world_model.frame_by_frame import FrameByFrame


def test_the_parts_of_a_chunk_are_imagined_one_after_the_other():
    # The toy world moves by the mean of what it is given: 0.2 for the first half, 0.6 for the rest.
    actions = np.array([[[0.1], [0.3], [0.5], [0.7]]], np.float32)
    world, key = toy.ToyWorld(), jax.random.key(0)
    start = FrameByFrame(world, 2).encode({}, toy.observation([1.0]), key)
    whole = FrameByFrame(world, 1).step({}, start, actions, key)
    halves = FrameByFrame(world, 2).step({}, start, actions, key)
    np.testing.assert_allclose(whole.observation.proprio, [[1.4]], atol=1e-6)
    np.testing.assert_allclose(halves.observation.proprio, [[1.8]], atol=1e-6)
    assert FrameByFrame(world, 2).success_probability({}, halves)[0] == 1
