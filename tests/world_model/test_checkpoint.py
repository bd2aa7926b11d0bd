"""BAGEL's checkpoint layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.parity_suites.bagel_training import export_arrays
from mbpo_jax.world_model.checkpoint import load_bagel
from mbpo_jax.world_model.config import bagel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bagel"
FILES = ("ema.safetensors", "ae.safetensors")


def copy_checkpoint(directory):
    for name in (*FILES, "llm_config.json", "vit_config.json", "vae_config.json"):
        shutil.copy(FIXTURES / name, directory / name)


def test_a_checkpoint_is_read_exactly():
    _, params = load_bagel(FIXTURES, bagel())
    found = export_arrays(params)
    stored = {name: array for file in FILES for name, array in load_file(FIXTURES / file).items()}
    assert found.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name], array)


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


def without(name):
    return lambda entries: entries.pop(name)


def having(**changes):
    return lambda entries: entries.update(changes)


@pytest.mark.parametrize(
    ("file", "change", "name"),
    [
        ("llm_config.json", without("rope_theta"), "rope_theta"),
        ("llm_config.json", without("num_hidden_layers"), "num_hidden_layers"),
        ("llm_config.json", having(hidden_size="64"), "hidden_size"),
        ("llm_config.json", having(rope_theta=None), "rope_theta"),
        ("llm_config.json", having(num_key_value_heads=0), "num_key_value_heads"),
        ("llm_config.json", having(num_attention_heads=4.5), "num_attention_heads"),
        ("vit_config.json", without("intermediate_size"), "intermediate_size"),
        ("vit_config.json", having(layer_norm_eps=float("nan")), "layer_norm_eps"),
        ("vae_config.json", having(scale_factor=[1]), "scale_factor"),
    ],
)
def test_a_configuration_without_an_entry_names_file_and_entry(tmp_path, file, change, name):
    copy_checkpoint(tmp_path)
    entries = json.loads((tmp_path / file).read_text())
    change(entries)
    (tmp_path / file).write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=name) as error:
        load_bagel(tmp_path, bagel())
    assert str(tmp_path / file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>403</html>", b"[1]", b"\xff\xfe"])
@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json", *FILES])
def test_another_file_in_place_of_one_is_named(tmp_path, file, content):
    copy_checkpoint(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|truncated|no map") as error:
        load_bagel(tmp_path, bagel())
    assert str(tmp_path / file) in str(error.value)


def test_an_array_of_another_rank_is_named(tmp_path):
    copy_checkpoint(tmp_path)
    arrays = load_file(tmp_path / FILES[0])
    arrays["vae2llm.weight"] = arrays["vae2llm.weight"].ravel()
    save_file(arrays, tmp_path / FILES[0])
    with pytest.raises(ValueError, match=r"vae2llm\.weight") as error:
        load_bagel(tmp_path, bagel())
    assert str(tmp_path) in str(error.value)
