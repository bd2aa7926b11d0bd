import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.theory import learned, tabular
from experiments.theory.learned import Episodes
from tests.experiments.theory.problems import random_problem


def test_chunk_numbers_spell_their_actions():
    np.testing.assert_array_equal(
        learned.chunk_actions(jnp.array([0, 5, 6]), 2, 3), [[0, 0, 0], [1, 0, 1], [1, 1, 0]]
    )


def test_counts_by_hand():
    # One episode of two chunks of two steps, chunk 1 = (0, 1) then chunk 2 = (1, 0).
    data = Episodes(jnp.array([[0, 1, 1, 0, 1]]), jnp.array([[1, 2]]))
    step = learned.estimate_step_model(data, 2, 2, 2, smoothing=1.0)
    # (s, a) → s': (0,0)→1, (1,1)→1, (1,1)→0, (0,0)→1; half an observation of each successor.
    np.testing.assert_allclose(step[0, 0], [0.5 / 3, 2.5 / 3], atol=1e-12)
    np.testing.assert_allclose(step[1, 1], [0.5, 0.5], atol=1e-12)
    np.testing.assert_allclose(step[0, 1], [0.5, 0.5], atol=1e-12)
    chunk = learned.estimate_chunk_model(data, 2, 2, 2, smoothing=1.0)
    np.testing.assert_allclose(chunk[0, 1], [0.25, 0.75], atol=1e-12)
    np.testing.assert_allclose(chunk[1, 2], [0.25, 0.75], atol=1e-12)
    # No episode used: the uniform guess.
    none = learned.estimate_chunk_model(data, 2, 2, 2, smoothing=1.0, count=0)
    np.testing.assert_allclose(none, np.full((2, 4, 2), 0.5), atol=1e-12)


def test_estimates_converge():
    problem = random_problem(1, "dense")
    data = learned.sample_episodes(
        jax.random.key(0), problem.step, problem.initial, problem.data_policy,
        k=2, episodes=20_000, length=10,
    )  # fmt: skip
    truth = tabular.chunk_kernel(problem.step, 2)
    errors = {}
    for count in (20, 20_000):
        step = learned.estimate_step_model(data, 4, 2, 2, 1.0, count)
        chunk = learned.estimate_chunk_model(data, 4, 2, 2, 1.0, count)
        errors[count] = [
            float((problem.data_policy * tabular.total_variation(truth, model)).mean())
            for model in (tabular.chunk_kernel(step, 2), chunk)
        ]
    # In a Markov world the composed step model is the better estimator of the chunk kernel.
    assert errors[20_000][0] < errors[20_000][1] < 0.01 < errors[20][0] < errors[20][1]


def test_floor_and_horizon():
    model = learned.with_floor(jnp.eye(2)[:, None, :], 0.1)
    np.testing.assert_allclose(model[0, 0], [0.95, 0.05], atol=1e-12)
    # A symmetric two-state leak of 5%: TV after h steps is (1 − 0.9^h)/2.
    errors = learned.horizon_errors(jnp.array([1.0, 0.0]), jnp.eye(2), model[:, 0], 3)
    np.testing.assert_allclose(errors, (1 - 0.9 ** np.arange(4)) / 2, atol=1e-12)


def test_improved_policy_improves():
    problem = random_problem(2)
    better = learned.improved_policy(problem.step, problem.reward, problem.data_policy, 0.9, 2, 0.3)
    truth = tabular.chunk_kernel(problem.step, 2)
    earned = tabular.chunk_reward(problem.step, problem.reward, 0.9, 2)

    def value(policy):
        kernel, reward = (tabular.under_policy(policy, table) for table in (truth, earned))
        return tabular.full_return(problem.initial, kernel, reward, 0.81)

    assert value(better) > value(problem.data_policy) + 1e-3
    assert tabular.total_variation(better, problem.data_policy).max() <= 0.3 + 1e-12


def test_bad_input_is_named():
    data = Episodes(jnp.array([[0, 1, 1]]), jnp.array([[1]]))
    with pytest.raises(ValueError, match=r"smoothing=0\.0"):
        learned.estimate_step_model(data, 2, 2, 2, 0.0)
    with pytest.raises(ValueError, match=r"floor=1\.5"):
        learned.with_floor(jnp.eye(2)[:, None, :], 1.5)
