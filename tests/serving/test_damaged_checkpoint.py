"""A server's checkpoint of which a file is lost or another."""

import json
import shutil

import pytest

from mbpo_jax.serving.inference import load
from mbpo_jax.stages.workspace import StageError


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "sft")


def test_a_lost_file_of_parameters_names_the_folder(copied):
    files = [path for path in (copied / "policy").rglob("*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(ValueError, match="incomplete or corrupt: the array") as error:
        load(copied, (1,))
    assert str(copied / "policy") in str(error.value)


@pytest.mark.parametrize("name", ["norm_stats.json", "config.json"])
def test_another_file_in_place_of_a_record_is_named(copied, name):
    (copied / name).write_text("<!DOCTYPE html>")
    with pytest.raises((ValueError, StageError)) as error:
        load(copied, (1,))
    assert str(copied / name) in str(error.value)


def test_a_record_that_lacks_a_section_names_it(copied):
    path = copied / "config.json"
    entries = json.loads(path.read_text())
    kept = {name: value for name, value in entries.items() if not name.startswith("policy.")}
    path.write_text(json.dumps(kept))
    with pytest.raises(StageError, match=r"has policy;") as error:
        load(copied, (1,))
    assert str(copied.parent) in str(error.value)
