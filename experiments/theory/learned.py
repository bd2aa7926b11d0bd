"""Models estimated from data: episodes of the data policy, counts with smoothing.

The question is the frame-skip argument: a chunk model predicts once where a step model predicts k
times, but it has A^k actions to learn and one observation where the step model has k.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.theory import checks, tabular


class Episodes(NamedTuple):
    """E episodes of L chunks: `states` int32 [E, L·k + 1], `chunks` int32 [E, L]."""

    states: Int[Array, "E Lk1"]
    chunks: Int[Array, "E L"]


def chunk_actions(chunks: Int[Array, "*B"], actions: int, k: int) -> Int[Array, "*B k"]:
    """The k actions that chunk numbers spell in base A, first action first."""
    return chunks[..., None] // actions ** jnp.arange(k - 1, -1, -1) % actions


@functools.partial(jax.jit, static_argnames=("k", "episodes", "length"))
def sample_episodes(
    key: Array,
    step: Float[Array, "*k S A S"],
    initial: Float[Array, " S"],
    data_policy: Float[Array, "S U"],
    *,
    k: int,
    episodes: int,
    length: int,
) -> Episodes:
    """Roll `data_policy` out in the true kernel for `length` chunks, `episodes` times."""
    steps = tabular.per_step(step, k)
    start_key, chunk_key, step_key = jax.random.split(key, 3)
    # Inverse-CDF sampling: one uniform per draw.
    start_u = jax.random.uniform(start_key, (episodes,))
    chunk_u = jax.random.uniform(chunk_key, (length, episodes))
    step_u = jax.random.uniform(step_key, (length, k, episodes))

    def draw(probabilities, u):
        below = jnp.cumsum(probabilities, -1)[..., :-1] < u[..., None]
        return below.sum(-1).astype(jnp.int32)

    def one_chunk(state, inputs):
        chunk_u, step_u = inputs
        chunk = draw(data_policy[state], chunk_u)
        acts = chunk_actions(chunk, step.shape[-2], k)
        visited = []
        for j in range(k):
            state = draw(steps[j, state, acts[:, j]], step_u[j])
            visited.append(state)
        return state, (chunk, jnp.stack(visited))

    first = draw(jnp.broadcast_to(initial, (episodes, initial.shape[0])), start_u)
    _, (chunks, visited) = jax.lax.scan(one_chunk, first, (chunk_u, step_u))
    later = visited.reshape(length * k, episodes)
    return Episodes(jnp.concatenate([first[None], later]).T, chunks.T)


def smoothed_counts(
    states: Int[Array, "E T"],
    actions: Int[Array, "E T"],
    next_states: Int[Array, "E T"],
    weights: Float[Array, " E"],
    shape: tuple[int, int],
    smoothing,
) -> Float[Array, "S A S"]:
    """(count + smoothing/S) / (total + smoothing): `smoothing` observations of a uniform guess."""
    if not checks.is_traced(smoothing) and not smoothing > 0:
        raise ValueError(f"smoothing must be > 0, got smoothing={smoothing}")
    size, choices = shape
    counts = jnp.zeros((size, choices, size))
    counts = counts.at[states, actions, next_states].add(weights[:, None])
    return (counts + smoothing / size) / (counts.sum(-1, keepdims=True) + smoothing)


def _weights(data: Episodes, count):
    used = jnp.arange(data.chunks.shape[0]) < (data.chunks.shape[0] if count is None else count)
    return used.astype(jnp.result_type(float))


def estimate_step_model(
    data: Episodes, states: int, actions: int, k: int, smoothing, count=None
) -> Float[Array, "S A S"]:
    """One-step model from every step, whatever its position in the chunk.

    `count`: how many of the episodes to use, from the first; it may be traced.
    """
    acts = chunk_actions(data.chunks, actions, k).reshape(data.chunks.shape[0], -1)
    return smoothed_counts(
        data.states[:, :-1],
        acts,
        data.states[:, 1:],
        _weights(data, count),
        (states, actions),
        smoothing,
    )


def estimate_chunk_model(
    data: Episodes, states: int, actions: int, k: int, smoothing, count=None
) -> Float[Array, "S U S"]:
    """Frame-skip model from the states at chunk boundaries alone; `count` as above."""
    ends = data.states[:, ::k]
    return smoothed_counts(
        ends[:, :-1],
        data.chunks,
        ends[:, 1:],
        _weights(data, count),
        (states, actions**k),
        smoothing,
    )


def with_floor(model: Float[Array, "S A S"], floor: float) -> Float[Array, "S A S"]:
    """Every *prediction* goes to a uniformly random state with probability `floor`: the part of a
    generative model's error that more data does not remove."""
    checks.check_error("floor", floor)
    return (1 - floor) * model + floor / model.shape[-1]


def horizon_errors(
    initial: Float[Array, " S"],
    true_kernel: Float[Array, "S S"],
    model_kernel: Float[Array, "S S"],
    horizon: int,
) -> Float[Array, " steps"]:
    """Total variation between true and imagined state after h = 0, …, horizon chunks: the
    compounding error. Kernels are those of the current policy."""

    def advance(carry, _):
        true, model = carry
        error = tabular.total_variation(true, model)
        return (true @ true_kernel, model @ model_kernel), error

    _, errors = jax.lax.scan(advance, (initial, initial), length=horizon + 1)
    return errors


def improved_policy(
    step: Float[Array, "*k S A S"],
    reward: Float[Array, "S A"],
    data_policy: Float[Array, "S U"],
    gamma,
    k: int,
    size,
) -> Float[Array, "S U"]:
    """A step of policy improvement: π = (1 − size) π_D + size · greedy(Q of π_D); ε_π ≤ size."""
    kernel = tabular.chunk_kernel(step, k)
    earned = tabular.chunk_reward(step, reward, gamma, k)
    system = jnp.eye(kernel.shape[0]) - gamma**k * tabular.under_policy(data_policy, kernel)
    value = jnp.linalg.solve(system, tabular.under_policy(data_policy, earned))
    advantage = earned + gamma**k * kernel @ value
    greedy = jax.nn.one_hot(advantage.argmax(-1), advantage.shape[-1], dtype=reward.dtype)
    return (1 - size) * data_policy + size * greedy
