from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.rl.ppo import actor_loss, critic_loss

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures/gae_ppo/gae_ppo.npz")


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.05, 2.0, -2.1),  # inside: -A ρ
        (1.30, 2.0, -2.2),  # gain is capped at 1 + ε
        (1.30, -2.0, 2.6),  # a loss is not capped upwards
        (0.80, -2.0, 1.8),  # capped at 1 - ε
        (0.80, 2.0, -1.6),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss):
    value, _ = actor_loss(
        jnp.log(jnp.array([ratio])), jnp.zeros(1), jnp.array([advantage]), jnp.ones(1), 0.1
    )
    np.testing.assert_allclose(value, loss, atol=1e-6)


def test_masked_entries_have_no_weight_and_no_gradient():
    def loss(log_prob):
        return actor_loss(
            log_prob, jnp.zeros(3), jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 1.0, 0.0]), 0.1
        )[0]

    grad = jax.grad(loss)(jnp.zeros(3))
    np.testing.assert_allclose(loss(jnp.array([0.0, 0.0, 50.0])), -1.5, atol=1e-6)
    np.testing.assert_allclose(grad, [-0.5, -1.0, 0.0], atol=1e-6)


def test_golden_actor_loss_without_asymmetry():
    # RLinf clips [1 - low, 1 + high]; with our symmetric clip the same formula in float64.
    g = {k.removeprefix("actor/flat/"): GOLDEN[k] for k in GOLDEN.files if "actor/flat/" in k}
    low = float(GOLDEN["ppo/clip_ratio_low"])
    log_prob, old = g["logprobs"].astype(np.float64), g["old_logprobs"].astype(np.float64)
    ratio = np.exp(log_prob - old)
    each = np.maximum(-g["advantages"] * ratio, -g["advantages"] * np.clip(ratio, 1 - low, 1 + low))
    expected = (each * g["loss_mask"]).sum() / g["loss_mask"].sum()
    value, _ = actor_loss(
        g["logprobs"], g["old_logprobs"], g["advantages"], g["loss_mask"].astype(np.float32), low
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "delta"), [("masked", "huber_delta"), ("masked_small", "huber_delta_small")]
)
def test_golden_critic_loss(case, delta):
    g = {k.removeprefix("critic/"): GOLDEN[k] for k in GOLDEN.files if k.startswith("critic/")}

    def loss(values):
        return critic_loss(
            values,
            g["prev_values"],
            g["returns"],
            g["loss_mask"].astype(np.float32),
            float(GOLDEN["ppo/value_clip"]),
            float(GOLDEN[f"ppo/{delta}"]),
        )

    value, grad = jax.value_and_grad(loss)(jnp.asarray(g["values"]))
    np.testing.assert_allclose(value, g[f"{case}/loss"], rtol=2e-6)
    np.testing.assert_allclose(grad, g[f"{case}/grad_values"], rtol=1e-5, atol=1e-7)
