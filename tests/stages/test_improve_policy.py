import signal

import jax
import ml_collections
import numpy as np
import pytest

from mbpo_jax.data.pipelines import Source
from mbpo_jax.stages import improve_policy
from mbpo_jax.stages.optimize_policy import optimize_policy
from mbpo_jax.stages.workspace import StageError
from mbpo_jax.toy import ToyPolicy, ToyWorld, WrongWorld, observation
from mbpo_jax.training.interruption import Interrupted
from mbpo_jax.training.metrics import MetricWriter, read_metrics
from mbpo_jax.types import Demonstration


def start_at(i: int, frame: int):
    """Start positions 0.4 to 0.9: the goal at 1 is reached by moving to the right."""
    return jax.tree.map(lambda x: x[0], observation([0.4 + i / 32]))


def starts(record=start_at) -> Source:
    return Source(record, [(i, 0) for i in range(16)])


def config(**changes) -> ml_collections.ConfigDict:
    rl = {
        "branch_chunks": 2,
        "start_states": 16,
        "imagination_batch": 8,
        "discount": 0.9,
        "discount_per": "reference",
        "gae_lambda": 0.95,
        "normalize_advantages": True,
        "reward_threshold": 0.5,
        "updates": 60,
        "updates_per_refill": 5,
        "value_recompute_every": 2,
        "checkpoint_every": 5,
        "critic_warmup": 5,
        "minibatch_size": 32,
        "gradient_accumulation": 1,
        "actor_lr": 2e-2,
        "critic_lr": 5e-2,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "clip_ratio": 0.2,
        "value_clip": 0.5,
        "huber_delta": 10.0,
        "group_size": 1,
        "dual_clip": 0.0,
        "exchange_advantages": False,
        "anchor_weight": 0.0,
    }
    parallel = {"fsdp": 1, "rules": (), "world_model": "replicated", "rollout": "shard_map"}
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "loggers": (),
            "chunk": 2,
            "parallel": parallel,
            "checkpoints": {"keep": 1},
            "profile_steps": (),
            "rl": {**rl, **changes},
        }
    )


def optimize(directory, record=start_at, policy=None, world=None, demonstrated=None, **changes):
    policy = policy or ToyPolicy()
    return optimize_policy(
        config(**changes),
        policy,
        world or ToyWorld(),
        policy.init(),
        {},
        starts(record),
        demonstrated,
        directory=directory,
    )


class RememberingWorld(ToyWorld):
    """Branches start at 0 where what was precomputed belongs to their observation."""

    def precompute(self, params, observation, key):
        return observation.proprio**2

    def encode(self, params, observation, key, precomputed=None):
        position = precomputed - observation.proprio**2
        return super().encode(params, observation, key, position)


def test_branches_start_from_what_was_precomputed_of_their_own_start(tmp_path, monkeypatch):
    branches = []
    monkeypatch.setattr(
        "mbpo_jax.stages.optimize_policy.branch_metrics",
        lambda branch: branches.append(branch) or {},
    )
    # 13 starts and 8 at a time: the last 3 rows of the second batch are filled up.
    source = Source(start_at, [(i, 0) for i in range(13)])
    changes = {"updates": 4, "updates_per_refill": 1, "critic_warmup": 0}
    optimize_policy(
        config(**changes),
        ToyPolicy(),
        RememberingWorld(),
        ToyPolicy().init(),
        {},
        source,
        directory=tmp_path,
    )
    positions = np.stack([b.observation.proprio[0] for b in branches])
    assert positions.shape == (4, 16, 1)
    np.testing.assert_allclose(positions, 0.0, atol=1e-6)


@pytest.mark.trains
def test_the_return_improves_in_an_exact_world(tmp_path):
    params = optimize(tmp_path)
    history = read_metrics(tmp_path / "metrics.jsonl")
    success = [r["imagined_success"] for r in history if "imagined_success" in r]
    assert np.mean(success[:2]) < 0.65
    assert np.mean(success[-3:]) > 0.9
    assert params["actor"]["mean"] > 0.3


@pytest.mark.trains
def test_groups_learn(tmp_path):
    changes = {"group_size": 4, "start_states": 64, "imagination_batch": 16, "updates": 40}
    assert optimize(tmp_path, **changes)["actor"]["mean"] > 0.2


@pytest.mark.trains
def test_the_anchor_keeps_a_wrong_world_from_carrying_the_policy_away(tmp_path):
    def shown(i, frame):
        return Demonstration(start_at(i, frame), np.zeros((2, 1), np.float32), np.float32(1))

    changes = {"group_size": 4, "start_states": 64, "imagination_batch": 16, "anchor_batch": 4}
    changes |= {"reward_threshold": 0.0, "updates": 60, "critic_warmup": 0, "critic_lr": 0.0}
    means = {
        weight: float(
            optimize(
                tmp_path / str(weight),
                world=WrongWorld(),
                demonstrated=starts(shown),
                anchor_weight=weight,
                **changes,
            )["actor"]["mean"]
        )
        for weight in (0.0, 10.0)
    }
    assert means[0.0] < -0.6
    assert abs(means[10.0]) < 0.2


def test_an_exchange_within_one_group_is_refused(tmp_path):
    with pytest.raises(ValueError, match="exchange_advantages"):
        optimize(tmp_path, group_size=16, exchange_advantages=True)


def test_a_group_starts_from_one_state(tmp_path, monkeypatch):
    branches = []
    monkeypatch.setattr(
        "mbpo_jax.stages.optimize_policy.branch_metrics",
        lambda branch: branches.append(branch) or {},
    )
    optimize(tmp_path, group_size=4, updates=1)
    (branch,) = branches
    start = branch.observation.proprio[0].reshape(4, 4)
    np.testing.assert_array_equal(start, start[:, :1].repeat(4, axis=1))
    assert len(np.unique(start)) == 4
    # Leave-one-out: the first chunks' advantages sum to zero in every group.
    advantage = np.asarray(branch.advantage[0]).reshape(4, 4)
    np.testing.assert_allclose(advantage.sum(1), 0.0, atol=1e-5)


def test_starts_that_are_done_are_found():
    source = Source(lambda i, f: start_at(2 * i, f), [(i, 0) for i in range(16)])
    done = improve_policy.done_at_start(config(), ToyWorld(), {}, source)
    np.testing.assert_array_equal(done, [0.4 + i / 16 > 1 for i in range(16)])


def test_the_warm_up_leaves_the_actor_alone(tmp_path):
    params = optimize(tmp_path, updates=5)
    assert float(params["actor"]["mean"]) == 0.0
    assert np.abs(params["critic"]["w"]).max() > 0.0


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = optimize(tmp_path / "whole", updates=15)

    class Killed(Exception):
        pass

    drawn = []

    def dying_at_the_third_refill(i, frame):
        drawn.append(i)
        if len(drawn) > 40:
            raise Killed
        return start_at(i, frame)

    with pytest.raises(Killed):
        optimize(tmp_path / "killed", dying_at_the_third_refill, updates=15)
    resumed = optimize(tmp_path / "killed", updates=15)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert read_metrics(tmp_path / "whole/metrics.jsonl") == read_metrics(
        tmp_path / "killed/metrics.jsonl"
    )


def test_sigterm_between_refills_saves_the_buffer_too(tmp_path, monkeypatch):
    whole = optimize(tmp_path / "whole", updates=15)
    write = MetricWriter.write

    def write_and_stop(self, step, scalars):
        write(self, step, scalars)
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricWriter, "write", write_and_stop)
        with pytest.raises(Interrupted) as exit_:
            optimize(tmp_path / "stopped", updates=15)
    assert "saved at step 7" in exit_.value.message
    resumed = optimize(tmp_path / "stopped", updates=15)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert read_metrics(tmp_path / "whole/metrics.jsonl") == read_metrics(
        tmp_path / "stopped/metrics.jsonl"
    )


def test_three_updates_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*step 2\."):
        optimize(tmp_path, huber_delta=np.nan)
    with np.load(tmp_path / "nonfinite_batch_step2.npz") as file:
        assert "value" in file.files


def test_no_start_states(tmp_path):
    with pytest.raises(StageError, match="no frame of the training rollouts is a state to start"):
        optimize_policy(
            config(),
            ToyPolicy(),
            ToyWorld(),
            ToyPolicy().init(),
            {},
            Source(start_at, np.zeros((0, 2))),
            directory=tmp_path,
        )
