import pytest

from mbpo_jax.stages.finetune_policy import finetune_policy
from mbpo_jax.stages.workspace import StageError
from tests.stages.test_fidelity import NUM_FRAMES, workspace


def test_failures_are_refused_by_a_policy_that_is_not_told_apart(tmp_path):
    made = workspace(tmp_path)
    made.config.sft.rollouts = str(tmp_path / "rollouts/dataset")
    with pytest.raises(StageError, match="advantage_conditioned"):
        finetune_policy(made, tmp_path)


def test_a_conditioned_policy_learns_from_rollouts_too(tmp_path):
    made = workspace(tmp_path)
    made.config.sft.update({"steps": 1, "rollouts": str(tmp_path / "rollouts/dataset")})
    made.config.policy.advantage_conditioned = True
    summary = finetune_policy(made, made.begin("sft", ["sft"]))
    # Every frame but each episode's last, of two demonstrations and two rollouts.
    assert summary["frames"] == 4 * (NUM_FRAMES - 1)
