import itertools
import time

import jax
import numpy as np

from configs import libero_long
from experiments.benchmarks import data


def small_config():
    config = libero_long.get_config("micro")
    for part in ("vision", "language", "expert"):
        config.policy[part].depth = 1
    model = config.world_model.model
    model.mot.num_layers = model.vit.num_layers = 1
    config.sft.batch_size = 2
    config.world_model.update({"dynamics_batch_size": 3, "reward_batch_size": 4})
    return config


def test_every_pipeline_is_measured_beside_its_consumer(monkeypatch):
    monkeypatch.setattr(data, "EPISODES", 4)
    reading, sft, joint = data.run(small_config(), "tiny", repeats=1)
    # 100 steps: a frame every 5, and 96 to 100 without those there already; two cameras.
    frames = 4 * 2 * (20 + 5)
    np.testing.assert_allclose(reading["frames_per_second"] * reading["seconds"], frames, rtol=1e-9)
    np.testing.assert_allclose(reading["episodes_per_second"] * reading["seconds"], 4, rtol=1e-9)
    np.testing.assert_allclose(sft["frames_per_second"] * sft["seconds"], 2 * 2, rtol=1e-9)
    # Two frames of a transition and one of a reward example, two cameras each.
    np.testing.assert_allclose(
        joint["frames_per_second"] * joint["seconds"], 2 * (2 * 3 + 4), rtol=1e-9
    )
    for row in (sft, joint):
        assert row["ratio"] == row["seconds"] / row["peer_seconds"]


def test_a_slow_pipeline_shows():
    def slow():
        for i in itertools.count():
            time.sleep(0.02)
            yield i

    assert data._drawing(slow())() >= 0.02


def test_the_episodes_have_what_training_needs():
    episode = data._episode(small_config(), 1)
    assert episode.timesteps[-1] == episode.length == 100
    assert episode.num_actions[-1] == 0
    assert len(jax.tree.leaves(episode.images)) == 2
