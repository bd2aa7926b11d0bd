import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.policy import network
from mbpo_jax.policy.config import variants
from mbpo_jax.training import loop
from mbpo_jax.training.interruption import Interrupted
from mbpo_jax.training.loop import Training, fit
from mbpo_jax.training.metrics import MetricWriter, read_metrics
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import shard_batch


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


def train(directory, last=10**9, make_batches=None, profile_steps=(), **changes):
    return fit(
        loss_fn,
        {"w": jnp.zeros(3)},
        {"slope": jnp.asarray(2.0)},
        make_batches or batches_dying_at(last),
        Training(**{**OPTIONS, **changes}),
        Run("test", directory, seed=3, profile_steps=profile_steps),
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
        Training(**{**OPTIONS, "weight_decay": 0.5}),
        Run("test", tmp_path, seed=3),
        trainable={"w": True, "slope": False},
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


def asked_to_stop_at(*steps):
    """Batches that send this process a SIGTERM while those of `steps` are made."""

    def batches(first):
        for i, batch in enumerate(batches_dying_at(10**9)(first), start=first):
            if i in steps:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    return batches


def test_sigterm_saves_within_a_logging_window_and_exits_with_status_0(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted) as exit_:
        train(tmp_path / "stopped", make_batches=asked_to_stop_at(13))
    assert "saved at step 14" in exit_.value.message
    assert exit_.value.code == 0
    resumed = train(tmp_path / "stopped", make_batches=batches_from(14))
    np.testing.assert_array_equal(whole["w"], resumed["w"])
    assert read_metrics(tmp_path / "whole/metrics.jsonl") == read_metrics(
        tmp_path / "stopped/metrics.jsonl"
    )


def test_sigterm_at_the_last_step_is_not_forgotten(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, make_batches=asked_to_stop_at(39))
    train(tmp_path, make_batches=batches_from(40))


def batches_from(expected):
    """Refuses to begin anywhere else, so that a resumed run repeats no step."""

    def batches(first):
        assert first == expected
        return batches_dying_at(10**9)(first)

    return batches


def broken_at(*steps):
    def batches(first):
        for i, batch in enumerate(batches_dying_at(10**9)(first), start=first):
            yield batch * np.float32(np.nan) if i in steps else batch

    return batches


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    train(tmp_path, make_batches=broken_at(4, 5, 7, 38), steps=4, checkpoint_every=4)
    before = train(tmp_path, steps=4, make_batches=broken_at())
    after = train(tmp_path, steps=6, make_batches=broken_at(4, 5, 7, 38))
    np.testing.assert_array_equal(before["w"], after["w"])
    train(tmp_path, make_batches=broken_at(4, 5, 7, 38))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows if row["step"] != 6] == [0, 1, *[0] * 7, 1]
    assert all(np.isfinite(row["loss"]) for row in rows if row["step"] != 6)


def test_three_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*step 12.*good.*batch_step12"):
        train(tmp_path, make_batches=broken_at(8, 10, 11, 12))
    with np.load(tmp_path / "nonfinite_batch_step12.npz") as file:
        (saved,) = (file[name] for name in file.files)
    assert saved.shape == (8, 3)
    assert np.isnan(saved).all()
    # The last checkpoint (step 10, whose step 10 is next) leads to the same end, not past it.
    with pytest.raises(FloatingPointError, match="step 12"):
        train(tmp_path, make_batches=broken_at(8, 10, 11, 12))
    train(tmp_path, make_batches=batches_from(10))


def test_a_trace_of_the_asked_steps_is_written(tmp_path):
    train(tmp_path, steps=6, profile_steps=(2, 4))
    (trace,) = (tmp_path / "tensorboard/plugins/profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 0
    with pytest.raises(ValueError, match=r"not \(4, 2\)"):
        train(tmp_path, profile_steps=(4, 2))


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


def test_muon_sees_each_matrix_of_the_policy_as_one():
    """Of every stacked weight: input axes, output axes and what is left are its size, and the input
    axes are those that are summed over."""
    config = variants()["micro"]
    actor = jax.eval_shape(lambda key: network.init(key, config), jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(actor)[0]
    found = {}
    for path, x in flat:
        name = "/".join(entry.key for entry in path)
        dimensions = loop._matrix_dimensions(path, x)
        if dimensions is not None:
            axes = dimensions.reduction_axis, dimensions.output_axis
            found[name] = tuple(int(np.prod([x.shape[a] for a in side])) for side in axes)
    width, heads, hidden = 128, 4 * 32, 256
    blocks, layers = "PaliGemma/img/Transformer/encoderblock", "PaliGemma/llm/layers"
    attention = f"{blocks}/MultiHeadDotProductAttention_0"
    assert found[f"{attention}/query/kernel"] == (width, heads)
    assert found[f"{attention}/out/kernel"] == (heads, width)
    assert found[f"{blocks}/MlpBlock_0/Dense_1/kernel"] == (hidden, width)
    assert found[f"{layers}/attn/q_einsum/w"] == (width, heads)
    assert found[f"{layers}/attn/kv_einsum_1/w"] == (width, 32)
    assert found[f"{layers}/attn/attn_vec_einsum_1/w"] == (heads, width)
    assert found[f"{layers}/mlp/gating_einsum"] == (width, hidden)
    assert found[f"{layers}/mlp_1/linear"] == (hidden, width)
    assert found[f"{layers}/pre_ffw_norm_1/Dense_0/kernel"] == (width, 3 * width)
    assert not [name for name in found if "embed" in name or "head/" in name or "scale" in name]
