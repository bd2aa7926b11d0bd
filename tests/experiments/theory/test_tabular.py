import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.theory import bounds, families, learned, tabular
from tests.experiments.theory import problems
from tests.experiments.theory.problems import evaluate, random_problem

# --- Hand-derived ------------------------------------------------------------------------------


def test_chunk_kernel_and_reward_of_a_two_state_machine():
    # Action 0 stays, action 1 moves with probability ¾; reward 1 in state 0 only.
    step = jnp.array([[[1.0, 0.0], [0.25, 0.75]], [[0.0, 1.0], [0.75, 0.25]]])
    reward = jnp.array([[1.0, 1.0], [0.0, 0.0]])
    kernel = tabular.chunk_kernel(step, 2)
    # Chunks 00, 01, 10, 11 from state 0; twice ¾ to move returns with 1/16 + 9/16.
    np.testing.assert_allclose(kernel[0, :, 0], [1.0, 0.25, 0.25, 10 / 16], atol=1e-12)
    np.testing.assert_allclose(kernel[1, :, 0], [0.0, 0.75, 0.75, 6 / 16], atol=1e-12)
    earned = tabular.chunk_reward(step, reward, 0.5, 2)
    np.testing.assert_allclose(earned[0], [1.5, 1.5, 1.125, 1.125], atol=1e-12)
    np.testing.assert_allclose(earned[1], [0.0, 0.0, 0.375, 0.375], atol=1e-12)


def test_leaking_chain():
    # Closed forms of README section 4; the numbers at γ = 0.99, k = 10.
    epsilon, gamma, k = 1e-5, 0.99, 10
    result = evaluate(problems.leak(epsilon, k), gamma, k)
    assert result.true == pytest.approx(100, abs=1e-9)
    by_hand = 2 * gamma * epsilon / ((1 - gamma) * (1 - gamma * (1 - epsilon)))
    assert result.true - result.full_accumulated == pytest.approx(by_hand, abs=1e-9)
    assert round((100 - result.full_accumulated) / epsilon) == 19780
    assert round((100 - result.full_given) / epsilon) == 18898
    assert result.step_error.data == pytest.approx(epsilon, rel=1e-9)
    chunk_error = 1 - (1 - epsilon) ** k
    assert result.chunk_error.worst == pytest.approx(chunk_error, rel=1e-9)
    # Γ = γ^10; the branch of 2 leaks once at i = 1, twice from i = 2 on.
    discount, range_ = gamma**k, (1 - gamma**k) / (1 - gamma)
    leaks = [1 - (1 - chunk_error) ** j for j in range(3)]
    gap = 2 * range_ * (discount * leaks[1] + discount**2 / (1 - discount) * leaks[2])
    assert result.true - result.branch_given[2] == pytest.approx(gap, abs=1e-9)


def test_unseen_chunk():
    epsilon, gamma = 1e-3, 0.9
    result = evaluate(problems.unseen_chunk(epsilon), gamma)
    assert result.true == pytest.approx(10, abs=1e-9)
    # P(fallen at i) = 1 − (1−ε)^i whatever n, real falls before the branch, imagined ones inside;
    # Γ = 0.81, R = 1.9.
    gap = 2 * 1.9 * (1 / (1 - 0.81) - 1 / (1 - 0.81 * (1 - epsilon)))
    np.testing.assert_allclose(10 - result.branch_given, np.full(5, gap), atol=1e-9)
    assert result.chunk_error.data == 0
    assert result.chunk_error.current == pytest.approx(epsilon, abs=1e-12)
    assert result.eps_pi_worst == pytest.approx(epsilon, abs=1e-12)


def test_detour():
    gamma = 0.9
    result = evaluate(problems.detour(), gamma)
    assert result.true == pytest.approx(10, abs=1e-9)
    np.testing.assert_allclose(
        10 - result.branch_accumulated, np.full(5, 2 * gamma / (1 - gamma**2)), atol=1e-9
    )
    # Wrong only half-way through a chunk (state 3 is never visited, 1 and 2 half-way only).
    assert result.composed_error.data == 0
    assert result.step_error.data == 1
    np.testing.assert_allclose(result.branch_composed, np.full(5, 10.0), atol=1e-9)


def test_late_fall():
    epsilon = 1e-3
    result = evaluate(problems.late_fall(epsilon), 0.9)
    # Fallen with 1 − (1−ε)^max(i − n, 0).
    gaps = [2 * 1.9 * 0.81**n * (1 / 0.19 - 1 / (1 - 0.81 * (1 - epsilon))) for n in range(5)]
    np.testing.assert_allclose(10 - result.branch_given, gaps, atol=1e-9)


def test_decoded_reward_by_hand():
    # γ = ½, k = 2, g = ±1: chunk i pays ½ · 4^−i (1 − 2P(leaked by time i + 1)).
    epsilon = 0.1
    result = evaluate(problems.leak(epsilon, 2), 0.5, 2)
    chunk = 1 - 0.9**2
    pays = [0.5 * sum(0.25**i * (1 - 2 * (1 - (1 - chunk) ** min(i + 1, n))) for i in range(40))
            for n in range(5)]  # fmt: skip
    np.testing.assert_allclose(result.branch_decoded, pays, atol=1e-9)
    assert result.true_decoded == pytest.approx(0.5 / 0.75, abs=1e-9)
    full = 0.5 * sum(0.25**i * (1 - 2 * (1 - (1 - chunk) ** (i + 1))) for i in range(40))
    assert result.full_decoded == pytest.approx(full, abs=1e-9)


# --- Properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_random_problems_are_proper(family):
    problem = random_problem(3, family)
    checked = tabular.chunk_problem(
        **{name: value for name, value in problem._asdict().items()}, k=2
    )
    assert np.abs(checked.reward).max() <= 1
    assert np.asarray(tabular.total_variation(problem.step, problem.step_model)).max() > 0


def test_returns_against_long_monte_carlo():
    gamma, k, problem = 0.8, 2, random_problem(1, "dense")
    result = evaluate(problem, gamma)

    def sampled(step, policy):
        data = learned.sample_episodes(
            jax.random.key(0), step, problem.initial, policy, k=k, episodes=40_000, length=30
        )
        actions = learned.chunk_actions(data.chunks, 2, k).reshape(40_000, -1)
        rewards = np.asarray(problem.reward)[np.asarray(data.states[:, :-1]), np.asarray(actions)]
        returns = rewards @ gamma ** np.arange(rewards.shape[1])
        return returns.mean(), 5 * returns.std() / np.sqrt(len(returns))

    mean, error = sampled(problem.step, problem.policy)
    assert abs(mean - result.true) < error
    mean, error = sampled(problem.step_model, problem.policy)
    assert abs(mean - result.full_accumulated) < error
    assert abs(result.true - result.full_accumulated) > 2 * error


def test_branched_return_against_its_definition():
    gamma, k, problem = 0.8, 2, random_problem(2)
    result = evaluate(problem, gamma)
    truth = tabular.chunk_kernel(problem.step, k)
    data = np.asarray(tabular.under_policy(problem.data_policy, truth))
    model = np.asarray(tabular.under_policy(problem.policy, problem.chunk_model))
    reward = np.asarray(tabular.under_policy(
        problem.policy, tabular.chunk_reward(problem.step, problem.reward, gamma, k)
    ))  # fmt: skip
    for n in range(5):
        total = 0.0
        for i in range(120):
            b, m = max(i - n, 0), min(i, n)
            law = np.asarray(problem.initial) @ np.linalg.matrix_power(data, b)
            total += gamma ** (k * i) * law @ np.linalg.matrix_power(model, m) @ reward
        assert result.branch_given[n] == pytest.approx(total, abs=1e-9)


def test_endless_branch_is_the_full_rollout():
    gamma, k, problem = 0.9, 2, random_problem(4)
    truth = tabular.chunk_kernel(problem.step, k)
    data_kernel = tabular.under_policy(problem.data_policy, truth)
    kernel = tabular.under_policy(problem.policy, problem.chunk_model)
    reward = tabular.under_policy(
        problem.policy, tabular.chunk_reward(problem.step, problem.reward, gamma, k)
    )
    starts = tabular.occupancy(problem.initial, data_kernel, gamma**k)
    returns = tabular.branched_returns(problem.initial, starts, kernel, reward, gamma**k, 150)
    full = tabular.full_return(problem.initial, kernel, reward, gamma**k)
    assert returns.shape == (151,)
    assert float(returns[-1]) == pytest.approx(float(full), abs=1e-9)
    assert abs(returns[1] - full) > 1e-3


def test_perfect_model_and_identical_policies():
    problem = random_problem(5)
    perfect = problem._replace(
        step_model=problem.step, chunk_model=tabular.chunk_kernel(problem.step, 2)
    )
    result = evaluate(perfect, 0.9)
    assert result.full_accumulated == pytest.approx(result.true, abs=1e-9)
    assert result.step_error.worst == 0
    assert result.chunk_error.worst == pytest.approx(0, abs=1e-12)
    assert abs(result.branch_given[0] - result.true) > 1e-4
    same = perfect._replace(policy=perfect.data_policy)
    result = evaluate(same, 0.9)
    assert result.eps_pi_worst == 0
    np.testing.assert_allclose(result.branch_given, np.full(5, result.true), atol=1e-9)
    # Identical policies, imperfect model: n = 0 is exact, longer branches are not.
    result = evaluate(problem._replace(policy=problem.data_policy), 0.9)
    assert result.branch_given[0] == pytest.approx(result.true, abs=1e-9)
    assert abs(result.branch_given[2] - result.true) > 1e-4


def test_no_future():
    problem = random_problem(6)
    result = evaluate(problem, 0.0)
    first = np.einsum("s,su,us->", problem.initial, problem.policy,
                       np.repeat(problem.reward, 2, axis=1).T)  # fmt: skip
    assert result.true == pytest.approx(first, abs=1e-12)
    assert result.full_accumulated == pytest.approx(first, abs=1e-12)
    np.testing.assert_allclose(result.branch_given, np.full(5, first), atol=1e-12)


def test_error_measures_against_their_definitions():
    problem, gamma = random_problem(7, "cycle"), 0.7
    result = evaluate(problem, gamma)
    step, data, policy = map(np.asarray, (problem.step, problem.data_policy, problem.policy))
    tv = 0.5 * np.abs(step - np.asarray(problem.step_model)).sum(-1)
    assert result.step_error.worst == pytest.approx(tv.max(), abs=1e-12)
    kernel = np.einsum("sax,xby->saby", step, step).reshape(4, 4, 4)
    law, worst, worst_pi = np.asarray(problem.initial), 0.0, 0.0
    for _ in range(problems.TIMES):
        worst_u = np.zeros(2)
        for u in range(4):
            weight = law * data[:, u]
            first, second = u // 2, u % 2
            per_step = np.zeros((2,))
            per_step[0] = weight @ tv[:, first]
            per_step[1] = weight @ step[:, first] @ tv[:, second]
            worst_u += per_step
        worst = max(worst, worst_u.max())
        worst_pi = max(worst_pi, law @ (0.5 * np.abs(data - policy).sum(-1)))
        law = law @ np.einsum("su,sux->sx", data, kernel)
    assert result.step_error.data == pytest.approx(worst, abs=1e-12)
    assert result.eps_pi_data == pytest.approx(worst_pi, abs=1e-12)
    assert result.eps_pi_data <= result.eps_pi_worst
    # Position 1 of a branch: one chunk of the current policy after data states.
    chunk_tv = 0.5 * np.abs(kernel - np.asarray(problem.chunk_model)).sum(-1)
    by_policy = (policy * chunk_tv).sum(-1)
    laws = np.asarray(tabular.state_distributions(
        problem.initial, jnp.asarray(np.einsum("su,sux->sx", data, kernel)), 64
    ))  # fmt: skip
    ahead = np.einsum("su,sux->sx", policy, kernel)
    assert result.chunk_error.branch[0] == pytest.approx((laws @ by_policy).max(), abs=1e-9)
    assert result.chunk_error.branch[1] == pytest.approx((laws @ ahead @ by_policy).max(), abs=1e-9)


def test_phased_steps():
    problem, k = random_problem(8), 2
    same = problem._replace(step=tabular.per_step(problem.step, k))
    np.testing.assert_allclose(
        evaluate(same, 0.9).branch_given, evaluate(problem, 0.9).branch_given, atol=1e-12
    )
    stay = jnp.broadcast_to(jnp.eye(4)[:, None, :], problem.step.shape)
    phased = tabular.chunk_kernel(jnp.stack([stay, problem.step]), k)
    # The first action does nothing, so chunks differ by their second action alone.
    np.testing.assert_allclose(phased[:, 1], problem.step[:, 1], atol=1e-12)
    np.testing.assert_allclose(phased[:, 3], problem.step[:, 1], atol=1e-12)


def test_maps_and_differentiates():
    def gap(problem, size):
        truth = tabular.under_policy(problem.policy, tabular.chunk_kernel(problem.step, 2))
        reward = problem.reward + size * jnp.eye(4)[:, :2]
        earned = tabular.chunk_reward(problem.step, reward, 0.9, 2)
        return tabular.full_return(
            problem.initial, truth, tabular.under_policy(problem.policy, earned), 0.81
        )

    both = [random_problem(0), random_problem(1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    returns = jax.jit(jax.vmap(lambda problem: gap(problem, 0.0)))(stacked)
    expected = [evaluate(problem, 0.9).true for problem in both]
    np.testing.assert_allclose(returns, expected, atol=1e-9)
    # The return is linear in the reward.
    slope = jax.jit(jax.grad(gap, argnums=1))(both[0], 0.0)
    rise = gap(both[0], 1.0) - gap(both[0], 0.0)
    assert float(slope) == pytest.approx(float(rise), abs=1e-9)


def test_bounds_of_a_chunk_reward():
    earned = tabular.chunk_reward(random_problem(9).step, jnp.ones((4, 2)), 0.9, 2)
    np.testing.assert_allclose(earned, bounds.chunk_reward_bound(0.9, 2), atol=1e-12)


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": np.ones((2, 1, 2))}, "step must sum to one"),
        ({"step": np.array([[[1.5, -0.5]], [[0.0, 1.0]]])}, "step holds a negative probability"),
        ({"initial": np.array([0.5, 0.4])}, "initial must sum to one"),
        ({"initial": np.ones(3) / 3}, r"initial must have shape \(2\), got \(3,\)"),
        ({"reward": np.ones((2, 2))}, r"reward must have shape \(2, 1\)"),
        ({"reward": np.array([[np.nan], [0.0]])}, "reward must be finite"),
        ({"policy": np.ones((2, 3)) / 3}, "policy must have shape"),
        ({"data_policy": np.array([[0.9], [1.0]])}, "data_policy must sum to one"),
        ({"step_model": np.ones((2, 1, 3)) / 3}, "step_model must have shape"),
        ({"chunk_model": np.ones((2, 2, 2)) / 2}, "chunk_model must have shape"),
        ({"step": np.ones((2, 2))}, "step must have shape"),
        ({"k": 0}, "got k=0"),
    ],
)
def test_bad_problem_is_named(change, message):
    good = problems.leak(0.1, 2)._asdict() | {"k": 2}
    with pytest.raises(ValueError, match=message):
        tabular.chunk_problem(**(good | change))


def test_bad_numbers_are_named():
    problem = problems.leak(0.1, 2)
    with pytest.raises(ValueError, match=r"gamma=1\.0"):
        tabular.evaluate(problem, 1.0, k=2, n_max=1, times=8)
    with pytest.raises(ValueError, match="n_max=-1"):
        tabular.evaluate(problem, 0.9, k=2, n_max=-1, times=8)
    with pytest.raises(ValueError, match="n_max must be finite"):
        tabular.evaluate(problem, 0.9, k=2, n_max=np.inf, times=8)
    with pytest.raises(ValueError, match="q must have shape"):
        tabular.total_variation(jnp.ones(2) / 2, jnp.ones(3) / 3)
    with pytest.raises(ValueError, match="did you mean 'sparse'"):
        families.family("sprase")
