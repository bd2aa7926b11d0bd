"""What each method computes, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compare import idql, imitation, penalties, recap, reinbot
from experiments.compare.recorded import Chunks
from mbpo_jax.mbpo import MBPO, Settings
from mbpo_jax.toy import ToyPolicy, observation
from mbpo_jax.types import Branch

close = pytest.approx


def test_expectile_loss():
    # τ = 0.7: 0.7 · 2² above the prediction, 0.3 · 2² below it.
    found = idql.expectile_loss(jnp.array([2.0, -2.0, 0.0]), 0.7)
    np.testing.assert_allclose(found, [2.8, 1.2, 0.0], atol=1e-6)


def test_the_target_of_q():
    # r + γ V(s') going on, r alone at the end: 0 + 0.9 · 0.5, 0.8, 0.
    reward, done = jnp.array([0.0, 0.8, 0.0]), jnp.array([0.0, 1.0, 1.0])
    found = idql.q_target(reward, done, jnp.array([0.5, 0.5, 0.5]), 0.9)
    np.testing.assert_allclose(found, [0.45, 0.8, 0.0], atol=1e-6)


def test_penalties():
    # Members say (0, 0) and (2, 4): variances 1 and 4, root mean square sqrt(2.5).
    predicted = jnp.array([[[0.0, 0.0]], [[2.0, 4.0]]])
    np.testing.assert_allclose(penalties.mopo_penalty(predicted), [2.5**0.5], atol=1e-6)
    # Values 0.1 and 0.5 deviate by 0.2 from their mean; γ^k = 0.9.
    values = jnp.array([[0.1], [0.5]])
    np.testing.assert_allclose(penalties.mobile_penalty(values, 0.9), [0.18], atol=1e-6)


def branch(**changes) -> Branch:
    """Two chunks from one start; nothing happens, and all values are 0."""
    nothing, start = jnp.zeros((2, 1)), observation([0.5])
    fields = {"log_prob": nothing, "value": nothing, "reward": nothing, "done": nothing}
    fields |= {"mask": nothing + 1.0, "bootstrap_value": jnp.zeros(1)}
    return Branch(
        observation=jax.tree.map(lambda x: jnp.stack([x, x]), start),
        chain=None,
        actions=jnp.zeros((2, 1, 2, 1)),
        last_observation=start,
        **(fields | changes),
    )


def test_the_penalty_is_subtracted_once_however_often_values_are_recomputed():
    settings = Settings(discount=0.5, discount_per="reference", gae_lambda=1.0)

    def penalty(observation, actions):
        return jnp.array([[0.2], [0.4]])

    mbpo = penalties.PenalisedMBPO(ToyPolicy(), settings, 2, penalty=penalty, beta=0.5)
    reward, mask = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [0.5]])
    once = mbpo.with_advantages(branch(reward=reward, mask=mask))
    # 1 − 0.5 · 0.5 · 0.4 = 0.9 for the second chunk; −0.5 · 0.2 + 0.5 · 0.9 = 0.35 for the first.
    np.testing.assert_allclose(once.returns[:, 0], [0.35, 0.9], atol=1e-6)
    np.testing.assert_array_equal(once.reward, reward)
    again = mbpo.with_advantages(once)
    np.testing.assert_allclose(again.returns, once.returns, atol=1e-6)
    plain = MBPO(ToyPolicy(), settings, 2).with_advantages(branch(reward=reward, mask=mask))
    np.testing.assert_allclose(plain.returns[:, 0], [0.5, 1.0], atol=1e-6)


def test_returns_of_progress():
    # At most 100 steps and a penalty of as many: all is divided by 200.
    left = np.array([50, 10, 0])
    won = recap.progress_returns(left, True, 100, 1.0)
    lost = recap.progress_returns(left, False, 100, 1.0)
    np.testing.assert_allclose(won, [-0.25, -0.05, 0.0], atol=1e-6)
    np.testing.assert_allclose(lost, [-0.75, -0.55, -0.5], atol=1e-6)


def test_advantages_of_chunks():
    returns = np.array([-0.75, -0.55, -0.5])  # the failure above
    value = np.array([-0.6, -0.4, -0.1])
    # 40 steps cost 0.2, and the value rose by 0.2.
    assert recap.chunk_advantage(returns, value, 0, 1) == close(0.0, abs=1e-6)
    # 10 steps cost 0.05; behind them is no value but the penalty: −0.05 − 0.5 + 0.4.
    assert recap.chunk_advantage(returns, value, 1, 2) == close(-0.15, abs=1e-6)


def test_the_best_share_of_each_task_and_all_demonstrations_are_good():
    advantage = np.array([-9.0, *range(10), *range(100, 110)])
    task = np.array([0] + [0] * 10 + [1] * 10)
    recorded = np.arange(21) > 0
    good = recap.labels(advantage, task, recorded, 0.3)
    assert np.flatnonzero(good).tolist() == [0, 8, 9, 10, 18, 19, 20]


def test_nearness_to_the_next_sub_goal():
    # Sub-goals 4 and 6: of a squared error of 16 are left 16, 9, 4, 1 and 0; then of 4 one half.
    frames = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 4.0 + 2**0.5, 6.0])[:, None]
    found = reinbot.nearness(frames, [4, 6])
    left = (2 - 2**0.5) ** 2 / 4
    np.testing.assert_allclose(found, [0, 7 / 16, 12 / 16, 15 / 16, 0, 1 - left, 1], atol=1e-6)


def test_smoothness_is_of_neighbouring_actions():
    chunks = np.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]], [[3.0, 3.0]] * 3])
    np.testing.assert_allclose(reinbot.smoothness(chunks), [-5 / 4, 0.0], atol=1e-6)


def test_returns_to_go_are_means_of_what_is_left():
    # Frames at 0, 5, 6 stand for 5, 1 and 1 steps.
    found = reinbot.returns_to_go(np.array([0.1, 0.3, 0.5]), np.array([0, 5, 6]), True)
    np.testing.assert_allclose(found, [1 + 1.3 / 7, 1.4, 1.5], atol=1e-6)
    lost = reinbot.returns_to_go(np.array([0.1, 0.3, 0.5]), np.array([0, 5, 6]), False)
    np.testing.assert_allclose(found - lost, 1.0, atol=1e-6)


def test_ranks_of_returns():
    first, second = reinbot.ranks([np.array([3.0, 1.0]), np.array([1.0, 2.0, 9.0])])
    np.testing.assert_allclose(first, [0.75, 0.0], atol=1e-6)
    np.testing.assert_allclose(second, [0.0, 0.5, 1.0], atol=1e-6)


def test_the_best_that_a_state_led_to_is_expected():
    draw = np.random.default_rng(0)
    features = np.repeat(np.array([[-1.0], [1.0]]), 500, axis=0)
    # One state led to anything from 0 to 0.2, the other from 0.5 to 1.
    quality = np.concatenate([draw.uniform(0, 0.2, 500), draw.uniform(0.5, 1, 500)])
    fitted = reinbot.fit_expected(
        features, quality, jax.random.key(0), width=16, expectile=0.9, steps=500
    )
    low, high = reinbot.expected_quality(fitted, np.array([[-1.0], [1.0]]))
    # The 0.9 expectile of a uniform draw from 0 to 1 is 0.75: 0.1 e² = 0.9 (1 − e)².
    assert low == close(0.15, abs=0.02)
    assert high == close(0.875, abs=0.03)


def test_chunks_up_to_success_are_imitated():
    # The first branch succeeds in its second chunk, the second one never does.
    done = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    mask = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    actions = jnp.arange(6.0).reshape(3, 2, 1, 1)
    seen = jax.tree.map(lambda x: jnp.stack([x] * 3), observation([0.0, 1.0]))
    imagined = branch(done=done, mask=mask).replace(actions=actions, observation=seen)
    chosen = imitation.successful_chunks(imagined)
    assert np.asarray(chosen.actions).ravel().tolist() == [0.0, 2.0]
    assert chosen.observation.proprio.ravel().tolist() == [0.0, 0.0]
    assert chosen.quality.all()


def line(count: int, key) -> Chunks:
    """Chunks on a line: the feature is the position, the action the move; beyond 1 it is done."""
    position_key, move_key = jax.random.split(key)
    position = jax.random.uniform(position_key, (count, 1), minval=0.0, maxval=1.0)
    move = 0.3 * jax.random.normal(move_key, (count, 1))
    done = (position + move > 1.0)[:, 0].astype(jnp.float32)
    return Chunks(position, move, position + move, done, done, jnp.zeros((count, 3), int))


@pytest.mark.trains
def test_q_learns_which_chunk_succeeds():
    key = jax.random.key(0)
    settings = {"width": 32, "expectile": 0.7, "target_rate": 0.02, "learning_rate": 3e-3}
    fitted = jax.jit(lambda c: idql.fit_q(c, key, steps=600, discount=0.9, **settings))(
        line(2000, key)
    )
    positions = jnp.array([[0.9], [0.9], [0.2], [0.2]])
    moves = jnp.array([[0.3], [-0.3], [0.3], [-0.3]])
    reaches, leaves, nearer, farther = idql.q_value(fitted, positions, moves)
    assert reaches > 0.9
    assert leaves < 0.9
    assert nearer > farther


@pytest.mark.trains
def test_members_agree_where_there_is_data():
    key = jax.random.key(1)
    members = jax.jit(lambda c: penalties.fit_members(c, key, members=5, width=32, steps=600))(
        line(500, key)
    )

    def disagreement(position, move):
        predicted = penalties.predict(members, jnp.full((1, 1), position), jnp.full((1, 1), move))
        return float(penalties.mopo_penalty(predicted)[0]), float(predicted.mean())

    seen, value = disagreement(0.5, 0.2)
    assert value == close(0.7, abs=0.05)
    assert disagreement(0.5, 3.0)[0] > 3 * seen
