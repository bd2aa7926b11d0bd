import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.training.loop import fit
from mbpo_jax.training.metrics import MetricWriter, read_metrics
from mbpo_jax.training.sharding import make_mesh, shard_batch


def loss_fn(params, frozen, batch, key):
    x = batch + 0.01 * jax.random.normal(key, batch.shape)
    error = jnp.mean(jnp.square(x @ params["w"] - frozen["slope"] * x.sum(-1)))
    return error, {"error": error}


def batches_dying_at(last):
    def batches(first):
        i = first
        while i < last:
            rng = np.random.default_rng(i)
            yield rng.normal(size=(8, 3)).astype(np.float32)
            i += 1
        raise KeyboardInterrupt

    return batches


OPTIONS = {
    "steps": 40,
    "learning_rate": 0.1,
    "warmup_steps": 5,
    "weight_decay": 0.0,
    "grad_clip": 10.0,
    "ema_decay": 0.9,
    "log_every": 4,
    "checkpoint_every": 10,
}


def train(directory, last=10**9, **changes):
    return fit(
        loss_fn,
        {"w": jnp.zeros(3)},
        {"slope": jnp.asarray(2.0)},
        batches_dying_at(last),
        directory=directory,
        mesh=make_mesh(),
        seed=3,
        name="test",
        **{**OPTIONS, **changes},
    )


def test_it_learns_a_line(tmp_path):
    params = train(tmp_path, steps=150)
    np.testing.assert_allclose(params["w"], [2.0, 2.0, 2.0], atol=0.05)


def test_a_frozen_parameter_neither_decays_nor_drifts(tmp_path):
    def loss(params, frozen, batch, key):
        return loss_fn(
            {"w": params["w"]}, {"slope": jax.lax.stop_gradient(params["slope"])}, batch, key
        )

    params = fit(
        loss,
        {"w": jnp.zeros(3), "slope": jnp.asarray(2.1)},
        {},
        batches_dying_at(10**9),
        directory=tmp_path,
        mesh=make_mesh(),
        seed=3,
        name="test",
        trainable={"w": True, "slope": False},
        **{**OPTIONS, "weight_decay": 0.5},
    )
    assert params["slope"] == jnp.asarray(2.1)
    assert np.all(params["w"] > 0.5)


def test_resume_equals_uninterrupted(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", last=27)
    resumed = train(tmp_path / "killed")
    np.testing.assert_array_equal(whole["w"], resumed["w"])
    assert read_metrics(tmp_path / "whole/metrics.jsonl") == read_metrics(
        tmp_path / "killed/metrics.jsonl"
    )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def broken(first):
        while True:
            yield np.full((8, 3), np.nan, np.float32)

    with pytest.raises(FloatingPointError, match="loss is nan at step 4"):
        fit(
            loss_fn,
            {"w": jnp.zeros(3)},
            {"slope": jnp.asarray(2.0)},
            broken,
            directory=tmp_path,
            mesh=make_mesh(),
            seed=0,
            name="test",
            steps=8,
            learning_rate=0.1,
            warmup_steps=1,
            weight_decay=0.0,
            grad_clip=1.0,
            ema_decay=0.9,
            log_every=4,
            checkpoint_every=100,
        )


def test_parameters_round_trip(tmp_path):
    params = {"a": {"b": jnp.arange(6.0).reshape(2, 3)}, "c": jnp.ones(2, jnp.int32)}
    save_params(tmp_path / "p", params)
    again = load_params(tmp_path / "p", jax.tree.map(jnp.zeros_like, params))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    with pytest.raises(FileNotFoundError, match="run the stage"):
        load_params(tmp_path / "absent", params)


def test_records_of_a_killed_run_are_dropped(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "x"')  # a line cut off by the kill
    with MetricWriter(tmp_path, first_step=3) as writer:
        writer.write(3, {"x": 30})
    assert [r["x"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 30]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_batch_that_does_not_divide_the_devices_is_refused():
    class TwoDevices:
        size = 2

    with pytest.raises(ValueError, match="batch of 3 does not divide over 2 devices"):
        shard_batch(np.zeros((3, 1)), TwoDevices())
