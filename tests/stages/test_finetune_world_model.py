"""What the world-model stage counts of its data."""

import types

import numpy as np

from mbpo_jax.stages.finetune_world_model import count_clipped


def test_actions_outside_the_range_are_counted_and_reported(capsys):
    limits = ((-1.0, 1.0), (0.0, 2.0))
    actions = np.ones((2, 3, 2))  # the ends of a range are inside
    episode = types.SimpleNamespace(actions=actions)
    assert count_clipped([episode], limits) == 0
    assert capsys.readouterr().out == ""
    actions[0, 0] = 1.5, -0.01
    assert count_clipped([episode, episode], limits) == 4
    assert "4 of 24 action values beyond their limits" in capsys.readouterr().out
