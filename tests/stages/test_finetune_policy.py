import dataclasses
import shutil

import numpy as np
import pytest

from mbpo_jax.data.episodes import read_episodes, write_episodes
from mbpo_jax.data.normalization import compute_norm_stats, read_norm_stats
from mbpo_jax.nn.normalization import BOUND, normalize
from mbpo_jax.stages.build import build_policy
from mbpo_jax.stages.finetune_policy import finetune_policy
from mbpo_jax.stages.workspace import StageError
from tests.stages.test_fidelity import NUM_FRAMES, workspace


def test_of_rollouts_successes_alone_are_imitated(tmp_path):
    made = workspace(tmp_path)
    rollouts = read_episodes(tmp_path / "rollouts/dataset")
    success = dataclasses.replace(rollouts[0], success=True)
    failures = [dataclasses.replace(episode, success=False) for episode in rollouts]
    write_episodes(tmp_path / "one", [success, *failures])
    write_episodes(tmp_path / "none", failures)
    made.config.sft.update({"steps": 1, "rollouts": str(tmp_path / "none")})
    with pytest.raises(StageError, match="advantage_conditioned"):
        finetune_policy(made, tmp_path)
    made.config.sft.rollouts = str(tmp_path / "one")
    summary = finetune_policy(made, made.begin("sft", ["sft"]))
    # Every frame but each episode's last, of two demonstrations and one rollout.
    assert summary["frames"] == 3 * (NUM_FRAMES - 1)


def test_a_dimension_that_seldom_moves_is_told_and_does_not_explode(tmp_path, capsys):
    made = workspace(tmp_path)
    made.config.policy.normalization = "quantile"
    dataset = tmp_path / "demonstrations/dataset"
    episodes = read_episodes(dataset)
    for episode in episodes:
        episode.target_actions[..., 3] = 0.0
    episodes[0].target_actions[2, 1, 3] = 0.3
    shutil.rmtree(dataset)
    write_episodes(dataset, episodes)
    made.config.sft.steps = 1
    summary = finetune_policy(made, made.begin("sft", ["sft"]))
    (line,) = summary["normalization_widened"]
    assert line.startswith("actions: roll")
    assert line in capsys.readouterr().out
    stats = read_norm_stats(tmp_path / "sft/norm_stats.json")["actions"]
    labels = np.concatenate([e.target_actions for e in episodes])
    assert np.abs(normalize(labels, stats, "quantile")).max() < 1.001 * BOUND
    # The stages after it read a file of the same numbers, and have nothing to tell.
    build_policy(made.config, read_norm_stats(tmp_path / "sft/norm_stats.json"))
    assert "warning" not in capsys.readouterr().out


def test_statistics_that_explode_are_told_by_the_stages_that_read_them(tmp_path, capsys):
    config = workspace(tmp_path).config
    config.policy.normalization = "quantile"
    rows = np.random.default_rng(0).uniform(-1, 1, (300, 7))
    rows[:, 3] = np.arange(300) == 5
    stats = {
        "actions": compute_norm_stats(rows),
        "state": compute_norm_stats(rows[:, :1] * np.ones(8)),
    }
    build_policy(config, stats)
    told = capsys.readouterr().out
    assert "roll" in told
    assert told.count("warning") == 1


def test_a_conditioned_policy_learns_from_rollouts_too(tmp_path):
    made = workspace(tmp_path)
    made.config.sft.update({"steps": 1, "rollouts": str(tmp_path / "rollouts/dataset")})
    made.config.policy.advantage_conditioned = True
    summary = finetune_policy(made, made.begin("sft", ["sft"]))
    # Every frame but each episode's last, of two demonstrations and two rollouts.
    assert summary["frames"] == 4 * (NUM_FRAMES - 1)
