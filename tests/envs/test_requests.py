"""Arithmetic of requests and recordings, without a simulator."""

import numpy as np
import pytest

from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.episode import action_windows, strided_timesteps


def test_windows_run_over_the_end_by_repeating_the_last_action():
    sent = np.arange(4.0)[:, None]  # actions 0, 1, 2, 3 of one dimension
    windows = action_windows(sent, np.array([0, 2, 4]), chunk=3)
    np.testing.assert_array_equal(windows[..., 0], [[0, 1, 2], [2, 3, 3], [3, 3, 3]])
    assert windows.dtype == np.float32


def test_frames_are_strided_and_hold_the_end():
    np.testing.assert_array_equal(
        strided_timesteps(17, stride=5, offset=3), [3, 8, 13, 14, 15, 16, 17]
    )
    # Shorter than the success frames: nothing before the start.
    np.testing.assert_array_equal(strided_timesteps(3, stride=5, offset=4), [0, 1, 2, 3])


def test_a_frame_has_the_frame_a_chunk_later():
    length, chunk = 63, 10
    steps = strided_timesteps(length, stride=5, offset=3)
    on_stride = [t for t in steps if t % 5 == 3]
    assert len(on_stride) == 13  # 3, 8, ..., 63
    assert all(min(t + chunk, length) in steps for t in on_stride)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one"),
        ({"seed": 1, "init_state_id": 2}, "exactly one"),
        ({"seed": 1, "max_steps": 0}, "max_steps"),
        ({"seed": 1, "action_noise": ()}, "action_noise"),
        ({"seed": 1, "action_noise": (0.1, -0.1)}, "action_noise"),
        ({"seed": 1, "aim_error": -0.01}, "aim_error"),
        ({"seed": 1, "aim_offset": (0.01,)}, "aim_offset"),
    ],
)
def test_impossible_requests_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        EpisodeRequest(task_id=0, **arguments)
