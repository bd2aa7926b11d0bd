"""Golden arrays of BAGEL's public code."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments.parity_suites import bagel
from experiments.parity_suites.bagel_golden import load

FIXTURES = Path(__file__).parents[2] / "fixtures" / "bagel"


def test_every_golden_array():
    rows = bagel.run(FIXTURES)
    assert len(rows) > 200
    assert not [row for row in rows if not row[3]]


def test_a_difference_is_found():
    golden = load(FIXTURES)
    norm = golden.params["mot"]["norm"]["gen"]
    changed = {**golden.params["mot"]["norm"], "gen": {"scale": norm["scale"] * 1.01}}
    mot = {**golden.params["mot"], "norm": changed}
    golden = dataclasses.replace(golden, params={**golden.params, "mot": mot})
    arrays = dict(np.load(FIXTURES / "embed.npz"))
    failed = [row[0] for row in bagel.embedding_rows(golden, "embed", arrays) if not row[3]]
    assert failed == ["rms_norm_moe_gen"]


def test_no_golden_data(tmp_path):
    with pytest.raises(ValueError, match="no golden data"):
        bagel.run(tmp_path)
