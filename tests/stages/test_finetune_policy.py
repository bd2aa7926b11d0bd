import dataclasses

import pytest

from mbpo_jax.data.episodes import read_episodes, write_episodes
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


def test_a_conditioned_policy_learns_from_rollouts_too(tmp_path):
    made = workspace(tmp_path)
    made.config.sft.update({"steps": 1, "rollouts": str(tmp_path / "rollouts/dataset")})
    made.config.policy.advantage_conditioned = True
    summary = finetune_policy(made, made.begin("sft", ["sft"]))
    # Every frame but each episode's last, of two demonstrations and two rollouts.
    assert summary["frames"] == 4 * (NUM_FRAMES - 1)
