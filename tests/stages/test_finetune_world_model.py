"""What the world-model stage counts of its data."""

import types

import numpy as np

from mbpo_jax.nn.normalization import BOUND
from mbpo_jax.stages.finetune_world_model import count_clipped
from mbpo_jax.world_model.statistics import widen_proprio


def test_actions_outside_the_range_are_counted_and_reported(capsys):
    limits = ((-1.0, 1.0), (0.0, 2.0))
    actions = np.ones((2, 3, 2))  # the ends of a range are inside
    episode = types.SimpleNamespace(actions=actions)
    assert count_clipped([episode], limits) == 0
    assert capsys.readouterr().out == ""
    actions[0, 0] = 1.5, -0.01
    assert count_clipped([episode, episode], limits) == 4
    assert "4 of 24 action values beyond their limits" in capsys.readouterr().out


def test_statistics_of_a_sample_have_room_for_all_other_proprioception():
    now = np.zeros((100, 2), np.float32)
    now[:, 1] = np.linspace(-1, 1, 100)
    later = now + np.array([0.0, 0.1], np.float32)
    later[50, 0] = now[51, 0] = 0.3  # a moment that the sample has left out
    sampled = {
        "proprio": {
            "mean": np.zeros(2, np.float32),
            "std": np.array([1e-6, 0.5], np.float32),
            "change": np.array([1e-6, 0.1], np.float32),
        },
        "pixel_change": {"head": 1.0},
    }
    statistics, wide = widen_proprio(sampled, now, later)
    assert wide == [0]
    found = statistics["proprio"]
    for values, by in ((now - found["mean"], "std"), (later - now, "change")):
        assert np.abs(values / found[by]).max() < 1.001 * BOUND
        assert found[by][1] == sampled["proprio"][by][1]
    assert statistics["pixel_change"] == sampled["pixel_change"]
    assert widen_proprio({"pixel_change": 1.0}, now, later) == ({"pixel_change": 1.0}, [])
