from pathlib import Path

import numpy as np
import pytest

from mbpo_jax.data.normalization import compute_norm_stats, read_norm_stats, write_norm_stats

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
    (tmp_path / "bad.json").write_text('{"norm_stats": {"state": {"mean": [1]}}}')
    with pytest.raises(ValueError, match=r"not an openpi norm_stats\.json"):
        read_norm_stats(tmp_path / "bad.json")
