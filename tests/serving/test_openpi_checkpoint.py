"""A checkpoint that openpi wrote, served with the statistics beside it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import libero_long
from experiments.parity_suites.pi05 import fixture_config
from mbpo_jax.data.normalization import write_norm_stats
from mbpo_jax.serving.inference import load_openpi
from tests.policy.conftest import stats
from tests.serving.conftest import message

FIXTURE = Path(__file__).parents[1] / "fixtures/pi05/pi05_tiny"


@pytest.fixture
def config():
    network = dataclasses.asdict(fixture_config(FIXTURE))
    del network["flow"]
    config = libero_long.get_config("tiny")
    with config.unlocked():
        config.policy = network
        config.image_size = 56
    return config


@pytest.fixture
def step(tmp_path):
    """The folder of a training step."""
    (tmp_path / "params").symlink_to(FIXTURE / "params")
    padded = jax.tree.map(lambda x: np.pad(x, (0, 24)), stats(8))  # as older openpi's are
    write_norm_stats(tmp_path / "assets/libero/norm_stats.json", dict(actions=padded, state=padded))
    return tmp_path


def test_it_acts(step, config):
    served = load_openpi(step, config, [1])
    assert served.metadata["action_dim"] == 7
    assert served.metadata["state_dim"] == 8
    image = np.zeros((56, 56, 3), np.uint8)
    observation = {**message(), "observation/image": image, "observation/wrist_image": image}
    chunk = served.answer([observation])[0]
    assert chunk.shape == (10, 7)
    assert np.isfinite(chunk).all()


def test_what_is_missing_is_told(step, config):
    write_norm_stats(step / "assets/droid/norm_stats.json", dict(actions=stats(8), state=stats(8)))
    with pytest.raises(ValueError, match=r"there are: assets/droid/.*assets/libero/"):
        load_openpi(step, config, [1])
    (step / "assets/droid/norm_stats.json").unlink()
    (step / "assets/libero/norm_stats.json").unlink()
    with pytest.raises(ValueError, match="there are: none"):
        load_openpi(step, config, [1])
