import numpy as np
import pytest

from mbpo_jax.episode import Episode


@pytest.fixture
def make_episode():
    """Episodes of 2x3 and 3x2 pixel views, k = 4, A = 2, P = 3, frames at `timesteps`."""

    def make(timesteps, success=True, seed=0, **fields):
        rng = np.random.default_rng(seed)
        timesteps = np.asarray(timesteps, np.int32)
        frames, length = len(timesteps), int(timesteps[-1])
        content = {
            "suite": "libero_10",
            "task_id": 5,
            "instruction": "pick up the book",
            "source": "expert",
            "seed": seed,
            "init_state_id": -1,
            "success": success,
            "length": length,
            "goal_fraction": 1.0 if success else 1 / 3,
            "timesteps": timesteps,
            "images": {
                "agentview": rng.integers(0, 256, (frames, 2, 3, 3), np.uint8),
                "wrist": rng.integers(0, 256, (frames, 3, 2, 3), np.uint8),
            },
            "proprio": rng.normal(size=(frames, 3)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (frames, 4, 2)).astype(np.float32),
            "target_actions": rng.uniform(-1, 1, (frames, 4, 2)).astype(np.float32),
            "num_actions": np.minimum(4, length - timesteps).astype(np.int32),
        }
        return Episode(**(content | fields))

    return make


@pytest.fixture
def assert_same_episode():
    def check(a, b):
        assert list(a.images) == list(b.images)
        for camera in b.images:
            assert a.images[camera].dtype == np.uint8
            np.testing.assert_array_equal(a.images[camera], b.images[camera])
        for name in ("timesteps", "proprio", "actions", "target_actions", "num_actions"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)
        for name in (
            *("suite", "task_id", "instruction", "source", "seed", "init_state_id"),
            *("success", "length", "goal_fraction"),
        ):
            x, y = getattr(a, name), getattr(b, name)
            assert (x, type(x)) == (y, type(y)), name

    return check
