"""Looking for MDPs that break a bound: random sampling, and gradient ascent on gap / bound."""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.theory import claims, families, tabular
from experiments.theory.tabular import ChunkProblem

# A gap and its bound both vanish with the errors; below this share of the range of returns
# 2 r_max/(1 − γ) their ratio is rounding, so the search must not go there.
FLOOR = 1e-9


class RandomCheck(NamedTuple):
    """gap / bound [M, N, C] of M problems, N branch lengths and the C claims; family index [M]."""

    ratios: np.ndarray
    family: np.ndarray


@functools.partial(jax.jit, static_argnames=("states", "actions", "k"))
def _draw(keys, kind, *, states, actions, k):
    draw = functools.partial(families.random_problem, states=states, actions=actions, k=k)
    return jax.vmap(draw, in_axes=(0, None))(keys, kind)


@functools.partial(jax.jit, static_argnames=("k", "ns", "times"))
def _ratios(problems, gamma, tables, *, k, ns, times):
    def one(problem):
        evaluation = tabular.evaluate(problem, gamma, k=k, n_max=max(ns), times=times)
        per_n = [claims.gaps_and_errors(evaluation, n) for n in ns]
        return jnp.stack([ratio(*parts, table, gamma) for parts, table in zip(per_n, tables)])

    return jax.vmap(one)(problems)


def ratio(gaps, errors, table, gamma):
    """gap / bound [C], with `FLOOR` times the range of returns added to the bound (r_max = 1)."""
    return gaps / ((table * errors).sum(-1) + FLOOR * 2 / (1 - gamma))


def check_random(
    key: Array,
    *,
    problems: int,
    batch: int,
    states: int,
    actions: int,
    k: int,
    ns: tuple[int, ...],
    gamma: float,
    progress=lambda batches: batches,
) -> RandomCheck:
    """Evaluate every claim on at least `problems` random problems, split evenly over the families.

    `batch` problems are held in memory at a time; `progress` wraps the list of batches (tqdm).
    """
    times = tabular.chunk_times(gamma, k)
    tables = jnp.stack([claims.coefficient_table(gamma, k, n) for n in ns])
    kinds = list(families.FAMILIES.values())
    rounds = -(-problems // (batch * len(kinds)))
    jobs = [(f, r) for f in range(len(kinds)) for r in range(rounds)]
    ratios, family = [], []
    for f, r in progress(jobs):
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, f), r), batch)
        drawn = _draw(keys, kinds[f], states=states, actions=actions, k=k)
        ratios.append(np.asarray(_ratios(drawn, gamma, tables, k=k, ns=ns, times=times)))
        family.append(np.full(batch, f))
    return RandomCheck(np.concatenate(ratios), np.concatenate(family))


# --- Gradient ascent ---------------------------------------------------------------------------


class Logits(NamedTuple):
    """An unconstrained `ChunkProblem`. Models and the current policy are mixtures of the truth
    (or the data policy) with something else, so that small errors are represented exactly."""

    step: Float[Array, "S A S"]
    reward: Float[Array, "S A"]
    initial: Float[Array, " S"]
    step_other: Float[Array, "S A S"]
    step_weight: Float[Array, "S A 1"]
    chunk_other: Float[Array, "S U S"]
    chunk_weight: Float[Array, "S U 1"]
    data_policy: Float[Array, "S U"]
    policy_other: Float[Array, "S U"]
    policy_weight: Float[Array, "S 1"]


def problem_of(logits: Logits, k: int) -> ChunkProblem:
    """The problem that `logits` stand for, |r| ≤ 1."""

    def mix(table, other, weight):
        weight = jax.nn.sigmoid(weight)
        return (1 - weight) * table + weight * jax.nn.softmax(other)

    step = jax.nn.softmax(logits.step)
    data_policy = jax.nn.softmax(logits.data_policy)
    return ChunkProblem(
        step=step,
        reward=jnp.tanh(logits.reward),
        initial=jax.nn.softmax(logits.initial),
        step_model=mix(step, logits.step_other, logits.step_weight),
        chunk_model=mix(tabular.chunk_kernel(step, k), logits.chunk_other, logits.chunk_weight),
        data_policy=data_policy,
        policy=mix(data_policy, logits.policy_other, logits.policy_weight),
    )


def initial_logits(key: Array, start: Array, *, states: int, actions: int, k: int) -> Logits:
    """Random logits from one of three starts: 0 dense, 1 peaked, 2 a leaking chain (states that
    are hardly left, models that fall into the last, badly rewarded state)."""
    chunks = actions**k
    shapes = Logits(
        (states, actions, states), (states, actions), (states,), (states, actions, states),
        (states, actions, 1), (states, chunks, states), (states, chunks, 1), (states, chunks),
        (states, chunks), (states, 1),
    )  # fmt: skip
    sizes = [math.prod(shape) for shape in shapes]
    flat = jnp.where(start == 1, 4.0, 1.0) * jax.random.normal(key, (sum(sizes),))
    pieces = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
    noise = Logits(*(piece.reshape(shape) for piece, shape in zip(pieces, shapes)))
    last = jnp.arange(states) == states - 1
    chain = noise._replace(
        step=noise.step + 8.0 * jnp.eye(states)[:, None, :],
        reward=noise.reward + jnp.where(last, -2.0, 2.0)[:, None],
        initial=noise.initial - 4.0 * last,
        step_other=noise.step_other + 6.0 * last,
        chunk_other=noise.chunk_other + 6.0 * last,
        step_weight=noise.step_weight - 5.0,
        chunk_weight=noise.chunk_weight - 5.0,
    )
    return jax.tree.map(lambda a, b: jnp.where(start == 2, b, a), noise, chain)


STARTS = 3


class Adversary(NamedTuple):
    """The worst found for each claim: gap / bound [C] and the problems, stacked [C, ...];
    gamma [C] the discount at which each was found."""

    ratio: np.ndarray
    gamma: np.ndarray
    problem: ChunkProblem


def climb(
    key: Array,
    *,
    gammas: Iterable[float],
    k: int,
    n: int,
    restarts: int,
    steps: int,
    states: int,
    actions: int,
    learning_rate: float = 0.1,
) -> Adversary:
    """Maximise log gap/bound over MDP, models and both policies by Adam, for all claims at once.

    Every claim is climbed at every γ from `restarts` random starts, `STARTS` kinds in turn.
    """
    gammas = jnp.array([float(gamma) for gamma in gammas])
    times = max(tabular.chunk_times(float(gamma), k) for gamma in gammas)
    tables = jnp.stack([claims.coefficient_table(float(gamma), k, n) for gamma in gammas])
    count = len(claims.CLAIMS)
    index = jnp.arange(count * len(gammas) * restarts)
    which_claim = index % count
    which_gamma = index // count % len(gammas)
    start = index // (count * len(gammas)) % STARTS
    logits = jax.vmap(functools.partial(initial_logits, states=states, actions=actions, k=k))(
        jax.random.split(key, len(index)), start
    )
    best_ratio, best_logits = _ascend(
        logits, which_claim, gammas[which_gamma], tables[which_gamma],
        k=k, n=n, times=times, steps=steps, learning_rate=learning_rate,
    )  # fmt: skip
    by_claim = np.asarray(best_ratio).reshape(-1, count)
    winner = by_claim.argmax(0) * count + np.arange(count)
    problem = jax.vmap(lambda one: problem_of(one, k))(
        jax.tree.map(lambda leaf: leaf[winner], best_logits)
    )
    return Adversary(
        by_claim.max(0),
        np.asarray(gammas[which_gamma[winner]]),
        jax.tree.map(np.asarray, problem),
    )


@functools.partial(jax.jit, static_argnames=("k", "n", "times", "steps", "learning_rate"))
def _ascend(logits, which_claim, gamma, table, *, k, n, times, steps, learning_rate):
    def log_ratio(logits, which_claim, gamma, table):
        evaluation = tabular.evaluate(problem_of(logits, k), gamma, k=k, n_max=n, times=times)
        gaps, errors = claims.gaps_and_errors(evaluation, n)
        # A gap of exactly zero has no direction to climb in.
        return jnp.log(ratio(gaps, errors, table, gamma)[which_claim] + 1e-12)

    optimiser = optax.adam(learning_rate)

    def total(logits):
        values = jax.vmap(log_ratio)(logits, which_claim, gamma, table)
        return -values.sum(), values

    def update(carry, _):
        logits, state, best, best_logits = carry
        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(logits)
        better = values > best

        def keep(new, old):
            return jnp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

        best_logits = jax.tree.map(keep, logits, best_logits)
        updates, state = optimiser.update(gradient, state)
        logits = optax.apply_updates(logits, updates)
        return (logits, state, jnp.maximum(values, best), best_logits), None

    first = (logits, optimiser.init(logits), jnp.full(which_claim.shape, -jnp.inf), logits)
    (_, _, best, best_logits), _ = jax.lax.scan(update, first, length=steps)
    return jnp.exp(best), best_logits
