"""Guidance arithmetic by hand (golden values: test_bagel)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.world_model import guidance
from mbpo_jax.world_model.config import GuidanceConfig
from mbpo_jax.world_model.generation import sampling_times, training_times

C, U_TEXT, U_IMAGE = (jnp.array([[[a, b]]]) for a, b in ((3.0, 4.0), (3.0, 0.0), (0.0, 0.0)))


def test_times_by_hand():
    # N = 3, shift 4: t = 1, 0.5, 0 -> 4 t / (1 + 3 t) = 1, 2 / 2.5, 0.
    np.testing.assert_allclose(sampling_times(3, 4.0), [1.0, 0.8, 0.0], atol=1e-7)
    np.testing.assert_allclose(training_times(jnp.array([0.0]), 4.0), [0.8], atol=1e-6)
    assert training_times(jnp.array([-jnp.inf]), 4.0) == 0.0


@pytest.mark.parametrize("renorm", guidance.RENORMS)
def test_combination_by_hand(renorm):
    config = GuidanceConfig(2.0, 3.0, renorm=renorm)
    # Text: (3, 0) + 2 (0, 4) = (3, 8). Image scale 3 triples it. |c| = 5; a guided velocity is
    # never made longer than c, and both rescalings are by a common factor of one token.
    direction = np.array([3.0, 8.0]) / np.sqrt(73.0)
    length = 15.0 if renorm == "text_channel" else 5.0
    found = guidance.combine(config, C, U_TEXT, U_IMAGE)
    np.testing.assert_allclose(found[0, 0], length * direction, rtol=1e-5)


def test_text_scale_one_switches_image_guidance_off_too():
    config = GuidanceConfig(1.0, 3.0)
    np.testing.assert_array_equal(guidance.combine(config, C, U_TEXT, U_IMAGE), C)
    assert not guidance.is_active(config, 0.5)


def test_interval_is_open_below_and_closed_above():
    config = GuidanceConfig(2.0, interval=(0.4, 0.8))
    times = (0.4, 0.41, 0.8, 0.81)
    assert [guidance.is_active(config, t) for t in times] == [False, True, True, False]


def test_unknown_renorm():
    with pytest.raises(ValueError, match="'chanel' is none of"):
        guidance.combine(GuidanceConfig(2.0, renorm="chanel"), C, U_TEXT, U_IMAGE)


def test_config_is_hashable_and_frozen():
    config = GuidanceConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.text_scale = 2.0
    assert hash(config) == hash(GuidanceConfig())
