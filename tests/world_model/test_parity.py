"""Golden arrays of BAGEL's public code, and its checkpoint layout."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mbpo_jax.world_model import parity
from mbpo_jax.world_model.checkpoint import load_bagel, save_bagel
from mbpo_jax.world_model.config import bagel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bagel"
FILES = ("ema.safetensors", "ae.safetensors")


def copy_checkpoint(directory):
    for name in (*FILES, "llm_config.json", "vit_config.json", "vae_config.json"):
        shutil.copy(FIXTURES / name, directory / name)


def test_every_golden_array():
    rows = parity.run(FIXTURES)
    assert len(rows) > 200
    assert not [row for row in rows if not row[3]]


def test_a_difference_is_found():
    golden = parity.load(FIXTURES)
    norm = golden.params["mot"]["norm"]["gen"]
    changed = {**golden.params["mot"]["norm"], "gen": {"scale": norm["scale"] * 1.01}}
    mot = {**golden.params["mot"], "norm": changed}
    golden = dataclasses.replace(golden, params={**golden.params, "mot": mot})
    arrays = dict(np.load(FIXTURES / "embed.npz"))
    failed = [row[0] for row in parity.embedding_rows(golden, "embed", arrays) if not row[3]]
    assert failed == ["rms_norm_moe_gen"]


def test_no_golden_data(tmp_path):
    with pytest.raises(ValueError, match="no golden data"):
        parity.run(tmp_path)


def test_checkpoint_round_trip_is_exact(tmp_path):
    config, params = load_bagel(FIXTURES, bagel())
    save_bagel(tmp_path / "copy", config, params)
    for name in FILES:
        original, copy = load_file(FIXTURES / name), load_file(tmp_path / "copy" / name)
        assert original.keys() == copy.keys()
        for key, array in original.items():
            np.testing.assert_array_equal(copy[key], array)
    again, reloaded = load_bagel(tmp_path / "copy", bagel())
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        save_bagel(tmp_path / "copy", config, params)


def test_all_wrong_arrays_are_named_at_once(tmp_path):
    copy_checkpoint(tmp_path)
    arrays = load_file(tmp_path / FILES[0])
    del arrays["connector.fc2.bias"]
    arrays["surplus.weight"] = np.zeros(3, np.float32)
    arrays["llm2vae.bias"] = arrays["llm2vae.bias"][:5]
    save_file(arrays, tmp_path / FILES[0])
    with pytest.raises(ValueError, match="does not fit") as error:
        load_bagel(tmp_path, bagel())
    for name in ("connector.fc2.bias", "surplus.weight", r"llm2vae.bias: (5,) instead of (64,)"):
        assert name in str(error.value)


def test_truncated_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"neither ema\.safetensors nor model\.safetensors"):
        load_bagel(tmp_path, bagel())
    copy_checkpoint(tmp_path)
    whole = (tmp_path / FILES[1]).read_bytes()
    (tmp_path / FILES[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"ae\.safetensors is truncated"):
        load_bagel(tmp_path, bagel())
    (tmp_path / FILES[1]).unlink()
    with pytest.raises(ValueError, match=r"ae\.safetensors is missing"):
        load_bagel(tmp_path, bagel())
