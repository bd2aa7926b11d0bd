import numpy as np
import pytest

from experiments.benchmarks.timing import interleave, measured, ratio


def test_ratio_is_the_median_of_the_rounds():
    peer = np.array([1.0, 2.0, 4.0])
    found = ratio(0.5 * peer, peer)
    assert found == {"ratio": 0.5, "low": 0.5, "high": 0.5}
    wide = ratio(np.array([1.0, 2.0, 3.0]), np.ones(3))
    assert wide == {"ratio": 2.0, "low": 1.0, "high": 3.0}


def test_rounds_alternate_and_the_first_is_dropped():
    calls = []

    def run(name, seconds):
        def once():
            calls.append(name)
            return seconds.pop(0)

        return once

    found = interleave(
        {"ours": run("ours", [9.0, 1.0, 2.0]), "peer": run("peer", [9.0, 3.0, 4.0])}, 2, "test"
    )
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer"]
    np.testing.assert_array_equal(found["ours"], [1.0, 2.0])
    np.testing.assert_array_equal(found["peer"], [3.0, 4.0])


def test_measured_relates_operations_to_the_peak():
    row = measured({"ours": np.array([2.0, 2.0])}, flops=8.0, peak=16.0)
    assert row == {"seconds": 2.0, "flops": 8.0, "flops_per_second": 4.0, "share_of_peak": 0.25}
    assert "ratio" not in row
    assert measured({"ours": np.ones(2), "peer": np.full(2, 4.0)})["ratio"] == pytest.approx(0.25)
