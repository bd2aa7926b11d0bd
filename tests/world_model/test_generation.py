import dataclasses

import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn.qwen2_mot import Cache
from mbpo_jax.world_model import generation
from mbpo_jax.world_model.config import GuidanceConfig
from mbpo_jax.world_model.guidance import Contexts
from tests.world_model.conftest import TINY


def run(monkeypatch, velocity, every):
    """The final tokens of four Euler steps at t = 1, 3/4, 1/2, 1/4 from noise 0."""

    def guided_velocity(params, config, tokenizer, contexts, x, t, rows, columns):
        return jnp.full_like(x, velocity(t))

    monkeypatch.setattr(generation, "guided_velocity", guided_velocity)
    config = dataclasses.replace(TINY, num_timesteps=5, evaluate_every=every)
    noise = jnp.zeros((1, 2, 3))
    return generation.trajectory({}, config, None, Contexts(None), noise, 1, 2)


def test_every_step_evaluates_by_default(monkeypatch):
    x, _, v = run(monkeypatch, lambda t: 1 + 2 * t, every=1)
    np.testing.assert_allclose(v[:, 0, 0, 0], [3, 2.5, 2, 1.5], atol=1e-6)
    np.testing.assert_allclose(x, -0.25 * (3 + 2.5 + 2 + 1.5), atol=1e-6)


def test_skipped_steps_extrapolate_two_evaluations(monkeypatch):
    # Evaluated at t = 1 and 1/2; one evaluation is kept, two are extended along their line.
    x, _, v = run(monkeypatch, lambda t: 1 + 2 * t, every=2)
    np.testing.assert_allclose(v[:, 0, 0, 0], [3, 3, 2, 1.5], atol=1e-6)
    np.testing.assert_allclose(x, -0.25 * (3 + 3 + 2 + 1.5), atol=1e-6)
    # Of a curve the line misses: t^2 at 1/4 becomes 1/4 + (1/4 - 1/2) * (1/4 - 1) / (1/2 - 1).
    _, _, v = run(monkeypatch, lambda t: t**2, every=2)
    np.testing.assert_allclose(v[:, 0, 0, 0], [1, 1, 0.25, -0.125], atol=1e-6)


def test_a_context_that_is_another_one_is_evaluated_once(monkeypatch):
    def cache(value):
        kv = jnp.full((1, 2, 1, 3, 2), value)
        return Cache(kv, kv, jnp.ones((2, 3), bool), jnp.array([3, 3]))

    rows = []

    def predict(params, config, tokenizer, contexts, x, t, *rest):
        rows.append(len(x))
        return x + jnp.concatenate([c.keys[0, :, 0, :1] for c in contexts])

    monkeypatch.setattr(generation, "predict", predict)
    config = dataclasses.replace(TINY, guidance=GuidanceConfig(3.0, 2.0))
    full, image_free = cache(1.0), cache(-1.0)
    x = jnp.arange(8.0).reshape(2, 2, 2)

    def velocity(text_free):
        contexts = Contexts(full, text_free, image_free)
        return generation.guided_velocity({}, config, None, contexts, x, 0.5, 1, 2)

    np.testing.assert_allclose(velocity(full), velocity(cache(1.0)), atol=1e-6)
    assert rows == [4, 6]
    # Nothing to guide by text (the contexts agree), by images -1 + 2 (1 - -1) = 3 beyond x.
    np.testing.assert_allclose(velocity(full), x + 3, atol=1e-6)
