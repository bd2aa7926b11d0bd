from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parity_suites import gae_ppo as parity
from mbpo_jax.mbpo import (
    MBPO,
    Settings,
    actor_loss,
    chunk_discount,
    generalized_advantages,
    leave_one_out,
)
from mbpo_jax.stages.imagination import gradient_agreement
from mbpo_jax.toy import CHUNK, ToyPolicy, observation
from mbpo_jax.types import Branch, Demonstration

PPO_FIELDS = ("log_prob", "value", "advantage", "returns")
FIXTURES = Path(__file__).parent / "fixtures"
AT_ONCE = {"critic_warmup": 0, "gradient_accumulation": 1}


def chunks(**known) -> Branch:
    """Chunks to learn from, of which only what learning needs is known."""
    return Branch(**{**dict.fromkeys(Branch.__dataclass_fields__), **known})


def test_two_chunks_by_hand():
    # γ = 0.9, λ = 0.5, V = (1, 2), bootstrap 4, r = (0, 1), no end:
    # δ1 = 1 + 0.9·4 - 2 = 2.6; δ0 = 0 + 0.9·2 - 1 = 0.8; A0 = 0.8 + 0.45·2.6 = 1.97
    advantage, returns = generalized_advantages(
        jnp.array([[0.0], [1.0]]),
        jnp.array([[1.0], [2.0]]),
        jnp.zeros((2, 1)),
        jnp.array([4.0]),
        0.9,
        0.5,
    )
    np.testing.assert_allclose(advantage[:, 0], [1.97, 2.6], atol=1e-6)
    np.testing.assert_allclose(returns[:, 0], [2.97, 4.6], atol=1e-6)


def test_an_ended_chunk_does_not_bootstrap():
    # done after chunk 0: A0 = r0 - V0 = 1 - 0.25, whatever follows.
    advantage, _ = generalized_advantages(
        jnp.array([[1.0], [7.0]]),
        jnp.array([[0.25], [3.0]]),
        jnp.array([[1.0], [0.0]]),
        jnp.array([9.0]),
        0.9,
        0.95,
    )
    np.testing.assert_allclose(advantage[0, 0], 0.75, atol=1e-6)


def test_discount_conventions():
    # 0.99^10 = 0.90438208, 0.99^9 = 0.91351725
    np.testing.assert_allclose(chunk_discount(0.99, 10, "paper"), (0.90438208, 0.91351725))
    assert chunk_discount(0.99, 10, "reference") == (0.99, 1.0)
    with pytest.raises(ValueError, match="discount_per"):
        chunk_discount(0.99, 10, "step")


def test_leave_one_out_by_hand():
    # (1, 2, 6): others' means 4, 3.5, 1.5; (0, 0, 3): 1.5, 1.5, 0.
    found = leave_one_out(jnp.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    np.testing.assert_allclose(found, [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0], atol=1e-6)


def test_groups_exchange_their_advantages():
    # Two chunks of six branches in groups of two: each group has those of the group before it.
    blank = dict.fromkeys(Branch.__dataclass_fields__)
    found = {"reward": jnp.arange(12.0).reshape(2, 6) ** 2, "bootstrap_value": jnp.zeros(6)}
    branch = Branch(**{**blank, "value": jnp.zeros((2, 6)), "done": jnp.zeros((2, 6)), **found})
    own, others = (
        MBPO(ToyPolicy(), Settings(group_size=2, exchange_advantages=exchange), CHUNK)
        .with_advantages(branch)
        .advantage
        for exchange in (False, True)
    )
    np.testing.assert_array_equal(others, own[:, jnp.array([4, 5, 0, 1, 2, 3])])
    assert np.abs(own).min() > 0


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
        jnp.log(jnp.array([ratio])), jnp.zeros(1), jnp.array([advantage]), jnp.ones(1), (0.1, 0.1)
    )
    np.testing.assert_allclose(value, loss, atol=1e-6)


def test_masked_entries_have_no_weight_and_no_gradient():
    def loss(log_prob):
        return actor_loss(
            log_prob,
            jnp.zeros(3),
            jnp.array([1.0, 2.0, 5.0]),
            jnp.array([1.0, 1.0, 0.0]),
            (0.1, 0.1),
        )[0]

    grad = jax.grad(loss)(jnp.zeros(3))
    np.testing.assert_allclose(loss(jnp.array([0.0, 0.0, 50.0])), -1.5, atol=1e-6)
    np.testing.assert_allclose(grad, [-0.5, -1.0, 0.0], atol=1e-6)


def test_the_clip_range_may_be_asymmetric():
    one = jnp.ones(1)
    gain, _ = actor_loss(jnp.log(1.3 * one), jnp.zeros(1), 2 * one, one, (0.1, 0.28))
    loss, metrics = actor_loss(jnp.log(0.8 * one), jnp.zeros(1), -2 * one, one, (0.1, 0.28))
    np.testing.assert_allclose((gain, loss), (-2.56, 1.8), atol=1e-6)
    assert metrics["clip_fraction"] == 1


def test_the_dual_clip_bounds_a_bad_chunk():
    # A = -2 at ratio 5: 10 without, 3 · 2 with a bound of 3, and no gradient; A = 2 stays as it is.
    def loss(log_ratio, advantage):
        one = jnp.ones(1)
        arguments = log_ratio * one, 0 * one, advantage * one, one
        return actor_loss(*arguments, (0.1, 0.1), dual_clip=3.0)[0]

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
    batch = chunks(
        observation=observation(rng.normal(size=count)),
        chain=rng.normal(size=(count, CHUNK, 1)).astype(np.float32),
        mask=np.float32([1, 1, 1, 0, 0, 1, 0, 0]),  # uneven shares of the slices
        **draws,
    )

    def gradient(slices):
        settings = Settings(clip_ratio=5.0, gradient_accumulation=slices)
        return jax.jit(MBPO(policy, settings, CHUNK).gradient)(params, batch)

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
        settings = Settings(actor_lr=0.1, critic_lr=0.1, weight_decay=0.5, **AT_ONCE)
        mbpo = MBPO(policy, settings, CHUNK, trainable)
        start = observation([0.0, 0.5])
        prefix = policy.encode(params, start)
        sample = policy.sample(params, prefix, jax.random.key(0))
        value = policy.value(params, prefix)
        batch = chunks(
            observation=start,
            chain=sample.chain,
            log_prob=sample.log_prob,
            value=value,
            advantage=jnp.array([1.0, -1.0]),
            returns=value + 1.0,
            mask=jnp.ones(2),
        )
        return mbpo.update(mbpo.init(params), batch)[0].params["actor"]

    frozen = after_update({"mean": True, "base": False})
    assert frozen["base"] == 1.0
    assert frozen["mean"] != 1.0
    # AdamW moves a parameter without gradient by -lr * decay.
    np.testing.assert_allclose(after_update(None)["base"], 1 - 0.1 * 0.5, atol=1e-6)


def test_the_anchor_pulls_by_its_weight():
    # The batch is masked, so all gradient is the anchor's: 3 · 2 · (0 - 0.5) = -3, and one step of
    # Adam moves by the learning rate against its sign.
    policy = ToyPolicy()
    options = {"actor_lr": 0.01, "weight_decay": 0.0, "grad_clip": 10.0, **AT_ONCE}
    blank = {name: jnp.zeros(2) for name in (*PPO_FIELDS, "mask")}
    batch = chunks(observation=observation([0, 0]), chain=jnp.zeros((2, CHUNK, 1)), **blank)
    shown = Demonstration(observation([0, 0]), jnp.full((2, CHUNK, 1), 0.5), jnp.ones(2))
    mbpo = MBPO(policy, Settings(anchor_weight=3.0, **options), CHUNK)
    state, metrics = mbpo.update(mbpo.init(policy.init()), batch, shown, jax.random.key(0))
    np.testing.assert_allclose(metrics["actor_grad_norm"], 3.0, atol=1e-6)
    np.testing.assert_allclose(state.params["actor"]["mean"], 0.01, atol=1e-6)
    mbpo = MBPO(policy, Settings(**options), CHUNK)
    state, metrics = mbpo.update(mbpo.init(policy.init()), batch)
    np.testing.assert_allclose(metrics["actor_grad_norm"], 0.0, atol=1e-6)


def test_gradients_of_opposite_batches_disagree():
    policy = ToyPolicy()
    mbpo = MBPO(policy, Settings(clip_ratio=5.0, **AT_ONCE), CHUNK)
    blank = {name: jnp.zeros(2) for name in ("log_prob", "value", "returns")}
    chain = jnp.array([[[0.5], [0.5]], [[0.1], [-0.1]]])
    batch = chunks(
        observation=observation([0, 0]),
        chain=chain,
        advantage=jnp.ones(2),
        mask=jnp.ones(2),
        **blank,
    )
    opposite = batch.replace(advantage=-batch.advantage)
    params = policy.init()
    np.testing.assert_allclose(gradient_agreement(mbpo, params, batch, batch), 1.0, atol=1e-5)
    np.testing.assert_allclose(gradient_agreement(mbpo, params, batch, opposite), -1.0, atol=1e-5)
