import json
from pathlib import Path

import chex
import numpy as np
import pytest

from mbpo_jax.data.normalization import (
    compute_norm_stats,
    far_extremes,
    read_norm_stats,
    widen,
    write_norm_stats,
)
from mbpo_jax.nn.normalization import BOUND, normalize, unnormalize

FIXTURES = Path(__file__).parents[1] / "fixtures" / "norm"


def test_reads_openpi_file():
    golden = np.load(FIXTURES / "norm.npz")
    stats = read_norm_stats(FIXTURES / "norm_stats.json")
    assert set(stats) == {"state", "actions"}
    for key, value in stats.items():
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_allclose(
                getattr(value, field), golden[f"stats/{key}/{field}"], rtol=1e-7
            )


def test_round_trip_is_exact(tmp_path):
    stats = read_norm_stats(FIXTURES / "norm_stats.json")
    write_norm_stats(tmp_path / "assets" / "norm_stats.json", stats)
    again = read_norm_stats(tmp_path / "assets" / "norm_stats.json")
    for key in stats:
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(again[key], field), getattr(stats[key], field))


def test_computed_by_hand():
    # 0, 1, ..., 100: mean 50, variance (101^2 - 1) / 12 = 850, quantiles 1 and 99.
    x = np.stack([np.arange(101.0), np.full(101, 3.0)], axis=-1).reshape(101, 1, 2)
    stats = compute_norm_stats(x)
    np.testing.assert_allclose(stats.mean, [50, 3], rtol=1e-6)
    np.testing.assert_allclose(stats.std, [np.sqrt(850), 0], rtol=1e-6)
    np.testing.assert_allclose(stats.q01, [1, 3], rtol=1e-6)
    np.testing.assert_allclose(stats.q99, [99, 3], rtol=1e-6)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        compute_norm_stats(np.zeros((0, 7)))
    with pytest.raises(ValueError, match=r"dimensions \[1\]"):
        compute_norm_stats(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="no normalisation statistics"):
        read_norm_stats(tmp_path / "missing.json")


GOOD = {"mean": [0.0, 1.0], "std": [1.0, 1.0], "q01": [-1.0, -1.0], "q99": [1.0, 2.0]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<!DOCTYPE html>",
        "[]",
        '{"norm_stats": []}',
        {"state": {"mean": [1]}, "actions": GOOD},
        {"state": GOOD},
        {"state": GOOD, "actions": GOOD | {"q99": ["a", "b"]}},
        {"state": GOOD, "actions": GOOD | {"q99": [1.0]}},
        {"state": GOOD, "actions": GOOD | {"q99": [1.0, float("nan")]}},
        {"state": GOOD, "actions": GOOD | {"q99": [1.0, -3.0]}},
        {"state": GOOD | {"std": [1.0, -1.0]}, "actions": GOOD},
        {"state": GOOD | {"mean": 0.0}, "actions": GOOD},
    ],
)
def test_a_file_that_holds_no_statistics_is_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"norm_stats": content}))
    with pytest.raises(ValueError, match=r"not an openpi norm_stats\.json") as error:
        read_norm_stats(path)
    assert str(path) in str(error.value)


def sparse_rows(value, size=300):
    """A dimension that is 0 but for one step, one that moves, and one that is constant."""
    rows = np.random.default_rng(0).uniform(-1, 1, (size, 3))
    rows[:, 0], rows[:, 2] = 0.0, 0.5
    rows[size // 2, 0] = value
    return rows


@pytest.mark.parametrize("value", [0.3, -2.0, 1e-3])
def test_a_dimension_that_seldom_moves_is_widened_and_named(value):
    rows = sparse_rows(value)
    own = compute_norm_stats(rows)
    assert np.abs(normalize(rows, own, "quantile")).max() > 100  # what it is for
    stats, lines = widen(own, rows, "quantile", ("gripper", "x", "y"))
    normalized = normalize(rows.astype(np.float32), stats, "quantile")
    chex.assert_shape(normalized, rows.shape)
    assert 0.9 * BOUND < np.abs(normalized).max() < 1.001 * BOUND
    np.testing.assert_allclose(unnormalize(normalized, stats, "quantile"), rows, atol=1e-5)
    assert len(lines) == 1
    assert "gripper" in lines[0]
    assert f"{value:.3g}" in lines[0]
    # All else, a constant among it, keeps openpi's numbers.
    np.testing.assert_array_equal(stats.q01[1:], own.q01[1:])
    np.testing.assert_array_equal(stats.q99[1:], own.q99[1:])
    np.testing.assert_array_equal(stats.std, own.std)


def test_a_range_that_is_tiny_beside_the_extremes_is_widened_too():
    rows = np.random.default_rng(0).normal(0, 1e-4, (1000, 7, 1))
    rows[3, 4] = 0.8
    stats, lines = widen(compute_norm_stats(rows), rows, "quantile", ("roll",))
    assert np.abs(normalize(rows, stats, "quantile")).max() < 1.001 * BOUND
    assert "roll" in lines[0]


def test_a_deviation_far_inside_the_extremes_is_widened():
    rows = sparse_rows(0.3, size=5000)
    own = compute_norm_stats(rows)
    stats, lines = widen(own, rows, "zscore", ("gripper", "x", "y"))
    assert np.abs(normalize(rows, own, "zscore")).max() > 3 * BOUND
    assert np.abs(normalize(rows, stats, "zscore")).max() < 1.001 * BOUND
    assert [line.split()[0] for line in lines] == ["gripper"]
    np.testing.assert_array_equal(stats.std[1:], own.std[1:])


@pytest.mark.parametrize("mode", ["quantile", "zscore"])
def test_ordinary_data_keep_openpis_numbers(mode):
    rows = np.random.default_rng(0).normal(size=(10_000, 2)) * [1.0, 1e-4]
    own = compute_norm_stats(rows)
    stats, lines = widen(own, rows, mode, ("x", "y"))
    assert lines == []
    chex.assert_trees_all_equal(stats, own)


def test_statistics_of_a_file_tell_what_is_far_beyond_them():
    own = compute_norm_stats(sparse_rows(0.3))
    lines = far_extremes(own, "quantile", ("gripper", "x", "y"))
    assert [line.split()[0] for line in lines] == ["gripper"]
    assert far_extremes(own, "zscore", ("gripper", "x", "y")) == []
    golden = read_norm_stats(FIXTURES / "norm_stats.json")
    for stats in golden.values():
        assert far_extremes(stats, "quantile", range(len(stats.mean))) == []
