from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parity_suites import gae_ppo as parity
from mbpo_jax.rl.gae import PPOBatch
from mbpo_jax.rl.ppo import PPO, actor_loss, gradient_agreement
from mbpo_jax.types import Demonstration
from tests.toy import CHUNK, ToyPolicy, observation

PPO_FIELDS = ("log_prob", "value", "advantage", "target")
FIXTURES = Path(__file__).parents[1] / "fixtures"


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
        jnp.log(jnp.array([ratio])), jnp.zeros(1), jnp.array([advantage]), jnp.ones(1), 0.1, 0.1
    )
    np.testing.assert_allclose(value, loss, atol=1e-6)


def test_masked_entries_have_no_weight_and_no_gradient():
    def loss(log_prob):
        return actor_loss(
            log_prob, jnp.zeros(3), jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 1.0, 0.0]), 0.1, 0.1
        )[0]

    grad = jax.grad(loss)(jnp.zeros(3))
    np.testing.assert_allclose(loss(jnp.array([0.0, 0.0, 50.0])), -1.5, atol=1e-6)
    np.testing.assert_allclose(grad, [-0.5, -1.0, 0.0], atol=1e-6)


def test_the_clip_range_may_be_asymmetric():
    one = jnp.ones(1)
    gain, _ = actor_loss(jnp.log(1.3 * one), jnp.zeros(1), 2 * one, one, 0.1, 0.28)
    loss, metrics = actor_loss(jnp.log(0.8 * one), jnp.zeros(1), -2 * one, one, 0.1, 0.28)
    np.testing.assert_allclose((gain, loss), (-2.56, 1.8), atol=1e-6)
    assert metrics["clip_fraction"] == 1


def test_the_dual_clip_bounds_a_bad_chunk():
    # A = -2 at ratio 5: 10 without, 3 · 2 with a bound of 3, and no gradient; A = 2 stays as it is.
    def loss(log_ratio, advantage):
        one = jnp.ones(1)
        arguments = log_ratio * one, 0 * one, advantage * one, one
        return actor_loss(*arguments, 0.1, 0.1, dual_clip=3.0)[0]

    high = jnp.log(5.0)
    np.testing.assert_allclose(loss(high, -2.0), 6.0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(high, -2.0), 0.0, atol=1e-6)
    np.testing.assert_allclose(loss(jnp.log(2.0), -2.0), 4.0, atol=1e-6)
    np.testing.assert_allclose(loss(high, 2.0), -2.2, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    policy, count = ToyPolicy(), 8
    params = policy.init()
    rng = np.random.default_rng(0)
    draws = {name: rng.normal(size=count).astype(np.float32) for name in PPO_FIELDS}
    batch = PPOBatch(
        observation=observation(rng.normal(size=count)),
        chain=rng.normal(size=(count, CHUNK, 1)).astype(np.float32),
        valid=np.float32([1, 1, 1, 0, 0, 1, 0, 0]),  # uneven shares of the slices
        **draws,
    )

    def gradient(slices):
        ppo = PPO(
            policy,
            actor_lr=0.1,
            critic_lr=0.1,
            weight_decay=0.0,
            grad_clip=1.0,
            clip_ratio=5.0,
            value_clip=0.5,
            huber_delta=10.0,
            critic_warmup=0,
            gradient_accumulation=slices,
        )
        return jax.jit(ppo.gradient)(params, batch)

    whole, parts = gradient(1), gradient(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    assert np.abs(whole[0]["actor"]["mean"]) > 1e-2


def test_golden_vectors():
    rows = parity.run(FIXTURES)
    assert len(rows) == 18
    assert not [row for row in rows if not row[3]]


def test_frozen_parameters_do_not_decay():
    class WithFrozenBase(ToyPolicy):
        def encode(self, params, observation):
            prefix = super().encode(params, observation)
            base = jax.lax.stop_gradient(params["actor"]["base"])
            return {**prefix, "mean": prefix["mean"] + base}

    def after_update(trainable):
        policy = WithFrozenBase()
        params = {
            "actor": {"mean": jnp.ones(()), "base": jnp.ones(())},
            "critic": {"w": jnp.ones(2)},
        }
        ppo = PPO(
            policy,
            actor_lr=0.1,
            critic_lr=0.1,
            weight_decay=0.5,
            grad_clip=1.0,
            clip_ratio=0.1,
            value_clip=0.5,
            huber_delta=10.0,
            critic_warmup=0,
            trainable=trainable,
        )
        start = observation([0.0, 0.5])
        prefix = policy.encode(params, start)
        sample = policy.sample(params, prefix, jax.random.key(0))
        value = policy.value(params, prefix)
        batch = PPOBatch(
            observation=start,
            chain=sample.chain,
            log_prob=sample.log_prob,
            value=value,
            advantage=jnp.array([1.0, -1.0]),
            target=value + 1.0,
            valid=jnp.ones(2),
        )
        return ppo.update(ppo.init(params), batch)[0].params["actor"]

    frozen = after_update({"mean": True, "base": False})
    assert frozen["base"] == 1.0
    assert frozen["mean"] != 1.0
    # AdamW moves a parameter without gradient by -lr * decay.
    np.testing.assert_allclose(after_update(None)["base"], 1 - 0.1 * 0.5, atol=1e-6)


class AnchoredPolicy(ToyPolicy):
    """Demonstrated actions pull the mean: loss (mean - actions)², gradient 2 (mean - actions)."""

    def loss(self, actor, observation, actions, key):
        loss = jnp.square(actor["mean"] - actions).mean()
        return loss, {"loss": loss}


def test_the_anchor_pulls_by_its_weight():
    # The batch is masked, so all gradient is the anchor's: 3 · 2 · (0 - 0.5) = -3, and one step of
    # Adam moves by the learning rate against its sign.
    policy = AnchoredPolicy()
    options = dict(actor_lr=0.01, critic_lr=0.0, weight_decay=0.0, grad_clip=10.0, clip_ratio=0.2)
    options |= dict(value_clip=0.5, huber_delta=10.0, critic_warmup=0)
    blank = {name: jnp.zeros(2) for name in (*PPO_FIELDS, "valid")}
    batch = PPOBatch(observation=observation([0, 0]), chain=jnp.zeros((2, CHUNK, 1)), **blank)
    shown = Demonstration(observation([0, 0]), jnp.full((2, CHUNK, 1), 0.5), jnp.ones(2, bool))
    ppo = PPO(policy, anchor_weight=3.0, **options)
    state, metrics = ppo.update(ppo.init(policy.init()), batch, shown, jax.random.key(0))
    np.testing.assert_allclose(metrics["actor_grad_norm"], 3.0, atol=1e-6)
    np.testing.assert_allclose(state.params["actor"]["mean"], 0.01, atol=1e-6)
    ppo = PPO(policy, **options)
    state, metrics = ppo.update(ppo.init(policy.init()), batch)
    np.testing.assert_allclose(metrics["actor_grad_norm"], 0.0, atol=1e-6)


def test_gradients_of_opposite_batches_disagree():
    policy = ToyPolicy()
    options = dict(actor_lr=0.01, critic_lr=0.0, weight_decay=0.0, grad_clip=10.0, clip_ratio=5.0)
    ppo = PPO(policy, value_clip=0.5, huber_delta=10.0, critic_warmup=0, **options)
    blank = {name: jnp.zeros(2) for name in ("log_prob", "value", "target")}
    chain = jnp.array([[[0.5], [0.5]], [[0.1], [-0.1]]])
    batch = PPOBatch(observation([0, 0]), chain, advantage=jnp.ones(2), valid=jnp.ones(2), **blank)
    opposite = batch.replace(advantage=-batch.advantage)
    params = policy.init()
    np.testing.assert_allclose(gradient_agreement(ppo, params, batch, batch), 1.0, atol=1e-5)
    np.testing.assert_allclose(gradient_agreement(ppo, params, batch, opposite), -1.0, atol=1e-5)
