import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import unflatten_dict

from experiments.parity_suites.pi05 import fixture_config
from mbpo_jax.policy.checkpoint import load_openpi

from .conftest import TINY, make_policy

GOLDEN = Path(__file__).parents[1] / "fixtures" / "pi05" / "pi05_tiny"


def golden_params():
    return unflatten_dict(dict(np.load(GOLDEN / "params_flat.npz")), sep="/")


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layout", ["params", "params_novalue"])
def test_reads_both_layouts_exactly(layout):
    actor = load_openpi(str(GOLDEN / layout), fixture_config(GOLDEN))
    assert_same_trees(actor, golden_params())


def test_shards_go_where_they_are_asked(tmp_path):
    config = fixture_config(GOLDEN)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = golden_params()
    actor = load_openpi(str(GOLDEN / "params"), config, jax.tree.map(lambda _: spec, shapes))
    assert {leaf.sharding for leaf in jax.tree.leaves(actor)} == {spec}


def test_one_error_lists_everything_that_differs(tmp_path):
    actor = make_policy().init(jax.random.key(0))["actor"]
    del actor["time_mlp_in"]
    actor["extra"] = {"kernel": np.zeros(3, np.float32)}
    actor["action_out_proj"]["bias"] = np.zeros(7, np.float32)
    leaves = jax.tree.map(lambda x: {"value": x}, {"params": actor})
    ocp.PyTreeCheckpointer().save(tmp_path / "params", leaves)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_openpi(str(tmp_path / "params"), TINY)
    message = str(error.value)
    assert "missing: time_mlp_in/bias" in message
    assert "missing: time_mlp_in/kernel" in message
    assert "unexpected: extra/kernel" in message
    assert "shape: action_out_proj/bias is (7,), the config needs (5,)" in message


def test_checkpoint_of_another_size_says_what_fits():
    config = dataclasses.replace(fixture_config(GOLDEN), vocab_size=300, action_dim=32)
    with pytest.raises(ValueError, match="vocab_size=256, action_dim=7 would fit"):
        load_openpi(str(GOLDEN / "params"), config)


def test_a_checkpoint_that_lost_a_file_names_the_array(tmp_path):
    shutil.copytree(GOLDEN / "params", tmp_path / "params")
    data = (tmp_path / "params" / "ocdbt.process_0" / "d").iterdir()
    max(data, key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(ValueError, match=r"incomplete or corrupt: the array params\.") as error:
        load_openpi(str(tmp_path / "params"), fixture_config(GOLDEN))
    assert str(tmp_path / "params") in str(error.value)


@pytest.mark.parametrize("kept", ["_METADATA", "manifest.ocdbt", "d"])
def test_one_file_of_a_checkpoint_is_incomplete(tmp_path, kept):
    (tmp_path / "params").mkdir()
    copy = shutil.copytree if (GOLDEN / "params" / kept).is_dir() else shutil.copy
    copy(GOLDEN / "params" / kept, tmp_path / "params" / kept)
    with pytest.raises(ValueError, match="incomplete or corrupt"):
        load_openpi(str(tmp_path / "params"), fixture_config(GOLDEN))


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no openpi checkpoint at .*nowhere"):
        load_openpi(str(tmp_path / "nowhere"), TINY)
