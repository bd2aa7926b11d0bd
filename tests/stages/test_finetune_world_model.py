"""What the world-model stage counts of its data."""

import types

import numpy as np

from mbpo_jax.stages.finetune_world_model import count_clipped


def test_actions_outside_the_range_are_counted_and_reported(capsys):
    actions = np.ones((2, 3, 7))  # the ends of the range are inside
    episode = types.SimpleNamespace(actions=actions)
    assert count_clipped([episode]) == 0
    assert capsys.readouterr().out == ""
    actions[0, 0, :2] = 1.5, -1.01
    assert count_clipped([episode, episode]) == 4
    assert "4 of 84 action values outside [-1, 1]" in capsys.readouterr().out
