import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mbpo_jax.data.pipelines import Source
from mbpo_jax.stages.rank_chunks import finetune_on_best
from mbpo_jax.toy import ToyPolicy, ToyWorld, observation


class ActingPolicy(ToyPolicy):
    def for_inference(self, params):
        return params

    def act(self, params, observation, key):
        return self.sample(params, self.encode(params, observation), key).actions

    def loss(self, actor, observation, actions, key, quality):
        return super().loss(actor, observation, actions, key)


def config(**changes):
    c = ml_collections.ConfigDict({"seed": 0, "loggers": (), "chunk": 2, "profile_steps": ()})
    c.parallel = {"fsdp": 1, "rules": (), "world_model": "replicated"}
    c.checkpoints = {"keep": 1}
    c.rl = {"group_size": 8, "imagination_batch": 64, "discount": 0.9, "discount_per": "reference"}
    c.rl.exchange_advantages = False
    c.rl.ranked = {
        "start_states": 100,
        "chunks": 1,
        "kept": 2,
        "batch_size": 16,
        "steps": 200,
        "learning_rate": 0.02,
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "ema_decay": 0.9,
        "gradient_accumulation": 1,
        "matrix_learning_rate": 0.0,
        "log_every": 50,
        "checkpoint_every": 50,
    }
    c.rl.update(changes)
    return c


def improved(directory, mean=0.0, **changes):
    policy = ActingPolicy()
    # The value grows to the right, so the best chunks are those that move farthest.
    critic = {"w": np.array([0.0, 0.2], np.float32)}
    params = {"actor": {"mean": jnp.float32(mean)}, "critic": critic}
    starts = Source(
        lambda e, f: jax.tree.map(lambda x: x[0], observation([-0.01 * e])),
        [(e, 0) for e in range(40)],
    )
    directory.mkdir(exist_ok=True)
    changed = config(**changes)
    found, summary = finetune_on_best(
        changed, policy, ToyWorld(), params, {}, starts, directory=directory, origin={}
    )
    return float(found["actor"]["mean"]), summary


def test_the_policy_moves_to_where_the_best_chunks_are(tmp_path):
    mean, summary = improved(tmp_path)
    # A chunk's mean deviates by 0.3 / sqrt(2); the two largest of 8 normal draws are 1.424 and
    # 0.852 deviations above the mean on average (tables of normal order statistics).
    assert mean == pytest.approx((1.424 + 0.852) / 2 * 0.3 / 2**0.5, abs=0.03)
    assert summary["imagined_chunks"] == 800
    assert summary["kept_score"] > summary["score"] + 0.5 * summary["score_std"]
    assert len(list((tmp_path / "ranked").iterdir())) == 13  # parts of 64 chunks: 8 states


def test_a_branch_is_learnt_up_to_its_success(tmp_path):
    # From up to -0.39 a chunk moves by 1.2 ± 0.2: about two thirds of the branches are done then.
    ranked = {**config().rl.ranked, "chunks": 2, "kept": 3}
    _, summary = improved(tmp_path, mean=1.2, ranked=ranked)
    assert summary["imagined_chunks"] == 1600
    learnt = 0
    for path in sorted((tmp_path / "ranked").iterdir()):
        with np.load(path) as part:
            first, going_on = part["actions"][:, 0], part["going_on"]
            assert first.shape == (8, 3, 2, 1)
            moved = part["proprio"][:, 0, :, 0] - first.mean((-2, -1))
            start = moved[:, :1]  # one start for every branch of a group
            np.testing.assert_allclose(moved, np.repeat(start, 3, axis=1), atol=1e-6)
            np.testing.assert_allclose(100 * start, np.round(100 * start), atol=1e-4)
            np.testing.assert_array_equal(going_on[:, 0], 1.0)
            np.testing.assert_array_equal(going_on[:, 1], part["proprio"][:, 0, :, 0] <= 1.0)
            assert part["view_camera"].shape == (8, 1, 3, 1, 1, 3)
            left = 100 - 8 * int(path.stem)  # the last part is filled up
            learnt += int(going_on[:left].sum())
    assert summary["chunks_learnt"] == learnt
    assert 300 < learnt < 600


def test_ranks_at_random_say_nothing(tmp_path):
    mean, _ = improved(tmp_path, exchange_advantages=True)
    assert abs(mean) < 0.04  # 0.3 / sqrt(2) / sqrt(200) = 0.015 is one standard error


def test_ranked_chunks_of_a_killed_run_are_not_imagined_again(tmp_path):
    whole, _ = improved(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    (stopped / "ranked").mkdir(parents=True)
    for path in sorted((tmp_path / "whole" / "ranked").iterdir())[:5]:
        (stopped / "ranked" / path.name).write_bytes(path.read_bytes())
    before = {path: path.stat().st_mtime_ns for path in (stopped / "ranked").iterdir()}
    assert improved(stopped)[0] == whole
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
