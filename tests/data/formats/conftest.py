import numpy as np
import pytest

from configs.libero_panda import ROBOT
from mbpo_jax.data.formats.conversion import Layout
from mbpo_jax.data.formats.recording import Names
from tests.recordings import CAMERAS


@pytest.fixture
def layout():
    return Layout("libero_10", CAMERAS, image_size=16, chunk=4, render_every=2, robot=ROBOT)


@pytest.fixture
def names():
    return Names(CAMERAS, {})


@pytest.fixture
def assert_is_truth():
    def check(episode, truth, tolerance=0):
        length = truth.steps - 1
        # Every second step, and the last five.
        steps = [s for s in range(length + 1) if s % 2 == 0 or s > length - 5]
        assert episode.timesteps.tolist() == steps
        assert episode.length == length
        assert episode.instruction == truth.instruction
        assert episode.num_actions.tolist() == [min(4, length - s) for s in steps]
        assert episode.num_actions[-1] == 0
        np.testing.assert_array_equal(episode.actions[1], truth.actions[2:6])
        np.testing.assert_array_equal(episode.target_actions, episode.actions)
        np.testing.assert_array_equal(episode.proprio, truth.proprio[steps])
        for camera, frames in truth.images.items():
            difference = episode.images[camera].astype(int) - frames[steps]
            assert episode.images[camera].dtype == np.uint8
            assert np.abs(difference).max() <= tolerance, camera

    return check
