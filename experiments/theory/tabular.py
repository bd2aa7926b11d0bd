"""Exact returns and model errors of tabular MDPs whose policy commits to chunks of k actions.

Shape letters: S states, A actions of a step, U = A^k chunks, H chunk times. Chunk number u spells
its actions in base A, first action first. Everything is pure, differentiable and can be mapped;
run it in float64 (`with jax.enable_x64(True)`), as float32 cannot tell small gaps from rounding.

A state at chunk time i is the state after i·k steps. Distributions are rows; kernels are
row-stochastic over their last axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.theory import checks


class ChunkProblem(NamedTuple):
    """A true MDP, two learned models of it, and two open-loop chunk policies.

    `step` may depend on the position within the chunk (a leading axis of k). `step_model` predicts
    one step and is composed k times; `chunk_model` predicts k steps at once (frame skipping).
    They need not agree with each other.
    """

    step: Float[Array, "*k S A S"]
    reward: Float[Array, "S A"]
    initial: Float[Array, " S"]
    step_model: Float[Array, "S A S"]
    chunk_model: Float[Array, "S U S"]
    data_policy: Float[Array, "S U"]
    policy: Float[Array, "S U"]


def chunk_problem(
    step, reward, initial, step_model, data_policy, policy, *, k: int, chunk_model=None
) -> ChunkProblem:
    """A checked `ChunkProblem`; `chunk_model=None` stands for the composition of `step_model`.

    Raises ValueError naming the argument whose shape or probabilities are wrong.
    """
    checks.check_chunk(k)
    states, actions = jnp.shape(step)[-3:-1] if jnp.ndim(step) >= 3 else (None, None)
    phase = (k,) if jnp.ndim(step) == 4 else ()
    checks.check_shape("step", step, (*phase, states, actions, states))
    checks.check_shape("reward", reward, (states, actions))
    checks.check_finite("reward", reward)
    checks.check_shape("initial", initial, (states,))
    checks.check_shape("step_model", step_model, (states, actions, states))
    checks.check_shape("data_policy", data_policy, (states, actions**k))
    checks.check_shape("policy", policy, (states, actions**k))
    if chunk_model is None:
        chunk_model = chunk_kernel(jnp.asarray(step_model), k)
    checks.check_shape("chunk_model", chunk_model, (states, actions**k, states))
    problem = ChunkProblem(
        *map(jnp.asarray, (step, reward, initial, step_model, chunk_model, data_policy, policy))
    )
    for name, value in problem._asdict().items():
        if name != "reward":
            checks.check_distribution(name, value)
    return problem


def total_variation(p: Float[Array, "*B S"], q: Float[Array, "..."]) -> Float[Array, "*B"]:
    """½ Σ |p − q| over the last axis, in [0, 1]."""
    checks.check_shape("q", q, jnp.shape(p))
    return 0.5 * jnp.abs(p - q).sum(-1)


# --- From steps to chunks ----------------------------------------------------------------------


def per_step(table, k: int):
    """Give a step kernel [S, A, S] a leading axis of k, unless it has one (a phased kernel)."""
    checks.check_chunk(k)
    if table.ndim == 4:
        checks.check_shape("step", table, (k, None, None, None))
        return table
    checks.check_shape("step", table, (None, None, None))
    return jnp.broadcast_to(table, (k, *table.shape))


def _prefixes(step, k: int):
    """Kernels [S, A^j, S] of the first j = 0, …, k actions of a chunk."""
    steps = per_step(step, k)
    states = steps.shape[-1]
    prefix = jnp.eye(states, dtype=steps.dtype)[:, None, :]
    yield prefix
    for j in range(k):
        prefix = jnp.einsum("spx,xay->spay", prefix, steps[j]).reshape(states, -1, states)
        yield prefix


def chunk_kernel(step: Float[Array, "*k S A S"], k: int) -> Float[Array, "S U S"]:
    """T(s' | s, u): the step kernel (or one per position) composed along the actions of u."""
    return list(_prefixes(step, k))[-1]


def along_chunk(
    step: Float[Array, "*k S A S"], value: Float[Array, "k S A"], k: int
) -> Float[Array, "k S U"]:
    """E[value_j(s_j, a_j) | s_0 = s, chunk u] for j = 0, …, k−1, under the kernel `step`."""
    _, states, actions = value.shape
    expected = []
    for j, prefix in zip(range(k), _prefixes(step, k)):
        here = jnp.einsum("spx,xa->spa", prefix, value[j]).reshape(states, -1)
        expected.append(jnp.repeat(here, actions ** (k - 1 - j), axis=1))
    return jnp.stack(expected)


def chunk_reward(
    step: Float[Array, "*k S A S"], reward: Float[Array, "S A"], gamma, k: int
) -> Float[Array, "S U"]:
    """R(s, u) = E Σ_{j<k} γ^j r(s_j, a_j), accumulated step by step under the kernel `step`.

    With the true kernel this is the given reward, with a model's the accumulated reward.
    """
    checks.check_gamma(gamma)
    powers = gamma ** jnp.arange(k, dtype=reward.dtype)
    return along_chunk(step, powers[:, None, None] * reward, k).sum(0)


def under_policy(
    policy: Float[Array, "S U"], table: Float[Array, "S U *rest"]
) -> Float[Array, " S *rest"]:
    """Average a table over chunks: kernels [S, U, S] become [S, S], rewards [S, U] become [S]."""
    checks.check_shape("table", table[..., 0] if table.ndim == 3 else table, policy.shape)
    return jnp.einsum("su,su...->s...", policy, table)


# --- Returns -----------------------------------------------------------------------------------


def occupancy(
    initial: Float[Array, " S"], kernel: Float[Array, " S S"], discount
) -> Float[Array, " S"]:
    """Σ_i discount^i d_i, by one linear solve; sums to 1/(1 − discount)."""
    checks.check_gamma(discount)
    system = jnp.eye(kernel.shape[0], dtype=kernel.dtype) - discount * kernel
    return jnp.linalg.solve(system.T, initial)


def full_return(initial, kernel: Float[Array, " S S"], reward: Float[Array, " S"], discount):
    """Σ_i discount^i E[reward(s_i)] when every transition is `kernel`'s; a scalar."""
    return occupancy(initial, kernel, discount) @ reward


def branched_returns(
    initial: Float[Array, " S"],
    data_occupancy: Float[Array, " S"],
    model_kernel: Float[Array, "S S"],
    reward: Float[Array, " S"],
    discount,
    n_max: int,
) -> Float[Array, " lengths"]:
    """Branched returns for n = 0, …, n_max: the chunk at time i starts from the state reached by
    max(i − n, 0) real chunks under the data policy and then min(i, n) model chunks,

    Σ_{i<n} Γ^i d_0 M^i r + Γ^n D M^n r,  M the model kernel, D = `occupancy` of the data policy.

    n → ∞ gives `full_return` in the model.
    """
    n_max = checks.check_finite_branch(n_max)

    def lengthen(carry, _):
        head, ahead, power = carry
        value = head + power * (data_occupancy @ ahead)
        head = head + power * (initial @ ahead)
        return (head, model_kernel @ ahead, power * discount), value

    one = jnp.ones((), reward.dtype)
    _, returns = jax.lax.scan(lengthen, (0 * one, reward, one), length=n_max + 1)
    return returns


# --- State distributions and errors --------------------------------------------------------------


def state_distributions(
    initial: Float[Array, " S"], kernel: Float[Array, " S S"], times: int
) -> Float[Array, "H S"]:
    """Distributions at chunk times 0, …, H − 1; H is `times` rounded up to a power of two.

    By doubling: log2(H) matrix products instead of H, which matters under `vmap` and `grad`.
    """
    rows, power = initial[None, :], kernel
    while rows.shape[0] < times:
        rows = jnp.concatenate([rows, rows @ power])
        power = power @ power
    return rows


class ErrorProfile(NamedTuple):
    """Model error of one model, total variation, in the ways a bound may measure it.

    worst: over all states and actions (or chunks). data: worst over time of the expectation under
    the data policy. current: the same under the current policy's own states. branch [n_max + 1]:
    entry j is the worst over start times of the expected error at the j-th chunk of a branch, data
    states first, then the current policy (true dynamics).
    """

    worst: Float[Array, ""]
    data: Float[Array, ""]
    current: Float[Array, ""]
    branch: Float[Array, " lengths"]


class Evaluation(NamedTuple):
    """Everything exact about one problem. Returns indexed by n have n_max + 1 entries.

    true: J(π). full_*: full horizon in the step model. branch_*: branches in the chunk model
    (given), in the composed step model (accumulated, composed: given rewards). branch_true_model:
    given rewards and no model error, what is left is the off-policy part. *_decoded: a chunk earns
    γ^(k−1) g(s') at its end, g(s) = r(s, 0); the state at its end was reached by max(i + 1 − n, 0)
    real and min(i + 1, n) model chunks; full_decoded is in the step model.
    """

    true: Float[Array, ""]
    full_given: Float[Array, ""]
    full_accumulated: Float[Array, ""]
    branch_given: Float[Array, " lengths"]
    branch_true_model: Float[Array, " lengths"]
    branch_accumulated: Float[Array, " lengths"]
    branch_composed: Float[Array, " lengths"]
    true_decoded: Float[Array, ""]
    full_decoded: Float[Array, ""]
    branch_decoded: Float[Array, " lengths"]
    eps_pi_worst: Float[Array, ""]
    eps_pi_data: Float[Array, ""]
    step_error: ErrorProfile
    chunk_error: ErrorProfile
    composed_error: ErrorProfile


def evaluate(problem: ChunkProblem, gamma, *, k: int, n_max: int, times: int) -> Evaluation:
    """Exact returns and errors of one problem; map over problems with `jax.vmap`.

    "Worst over time" is taken over the first `times` chunk times. What comes later weighs at most
    2 r_max γ^(k·times)/(1 − γ) in any gap, so choose `times` to make that negligible
    (`chunk_times`).
    """
    step, reward, initial, step_model, chunk_model, data_policy, policy = problem
    checks.check_gamma(gamma)
    discount = gamma**k
    n_max = checks.check_finite_branch(n_max)
    truth, composed = chunk_kernel(step, k), chunk_kernel(step_model, k)
    data_kernel, true_kernel = under_policy(data_policy, truth), under_policy(policy, truth)
    step_kernel, skip_kernel = under_policy(policy, composed), under_policy(policy, chunk_model)
    given = under_policy(policy, chunk_reward(step, reward, gamma, k))
    accumulated = under_policy(policy, chunk_reward(step_model, reward, gamma, k))
    goal, last = reward[:, 0], gamma ** (k - 1)

    # Like things are stacked and mapped, which makes the program smaller and faster to compile.
    by_data, by_policy, by_model = jax.vmap(occupancy, in_axes=(None, 0, None))(
        initial, jnp.stack([data_kernel, true_kernel, step_kernel]), discount
    )
    branches = jax.vmap(branched_returns, in_axes=(None, None, 0, 0, None, None))(
        initial,
        by_data,
        jnp.stack([skip_kernel, true_kernel, step_kernel, step_kernel, skip_kernel]),
        jnp.stack([given, given, accumulated, given, last * (skip_kernel @ goal)]),
        discount,
        n_max,
    )
    # A decoded branch of n is a branch of n − 1 whose chunks earn the goal one chunk later.
    decoded = jnp.concatenate([(last * (by_data @ data_kernel @ goal))[None], branches[4, :-1]])

    policy_tv = total_variation(data_policy, policy)
    step_tv = total_variation(per_step(step, k), per_step(step_model, k))
    chunk_tv = total_variation(truth, chunk_model)
    composed_tv = total_variation(truth, composed)
    errors = jnp.concatenate([along_chunk(step, step_tv, k), chunk_tv[None], composed_tv[None]])
    data_states, current_states = jax.vmap(state_distributions, in_axes=(None, 0, None))(
        initial, jnp.stack([data_kernel, true_kernel]), times
    )
    expected = jnp.einsum("psu,jsu->psj", jnp.stack([data_policy, policy]), errors)
    data = data_states @ jnp.concatenate([expected[0], policy_tv[:, None]], axis=1)
    current = current_states @ expected[1]
    _, ahead = jax.lax.scan(lambda v, _: (true_kernel @ v, v), expected[1], length=n_max + 1)
    branch = jnp.einsum("hs,nsj->nhj", data_states, ahead).max(1)

    def profile(worst, rows):
        return ErrorProfile(
            worst, data[:, rows].max(), current[:, rows].max(), branch[:, rows].max(1)
        )

    return Evaluation(
        true=by_policy @ given,
        full_given=by_model @ given,
        full_accumulated=by_model @ accumulated,
        branch_given=branches[0],
        branch_true_model=branches[1],
        branch_accumulated=branches[2],
        branch_composed=branches[3],
        true_decoded=last * (by_policy @ true_kernel @ goal),
        full_decoded=last * (by_model @ step_kernel @ goal),
        branch_decoded=decoded,
        eps_pi_worst=policy_tv.max(),
        eps_pi_data=data[:, -1].max(),
        step_error=profile(step_tv.max(), slice(0, k)),
        chunk_error=profile(chunk_tv.max(), slice(k, k + 1)),
        composed_error=profile(composed_tv.max(), slice(k + 1, k + 2)),
    )


def chunk_times(gamma: float, k: int, tolerance: float = 1e-10) -> int:
    """The number of chunk times H, a power of two, with γ^(kH) ≤ tolerance."""
    checks.check_gamma(gamma)
    checks.check_chunk(k)
    times = 1
    while gamma ** (k * times) > tolerance:
        times *= 2
    return times
