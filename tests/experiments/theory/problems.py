"""The worked examples of experiments/theory/README.md, section 4, and how the tests evaluate them.

All but `leak` have four states, two actions and k = 2, so that the tests compile one program.
"""

import functools

import jax
import numpy as np

from experiments.theory import families, tabular
from experiments.theory.tabular import ChunkProblem, chunk_problem

TIMES = 256  # chunk times; enough for γ ≤ 0.9 and, with k = 10, for γ = 0.99
_evaluate = jax.jit(
    functools.partial(tabular.evaluate, times=TIMES), static_argnames=("k", "n_max")
)


def evaluate(problem: ChunkProblem, gamma: float, k: int = 2, n_max: int = 4):
    """`tabular.evaluate` as NumPy arrays, which `pytest.approx` understands."""
    return jax.tree.map(np.asarray, _evaluate(problem, gamma, k=k, n_max=n_max))


def random_problem(seed: int = 0, family: str = "sparse") -> ChunkProblem:
    return _draw(jax.random.key(seed), families.family(family))


_draw = jax.jit(functools.partial(families.random_problem, states=4, actions=2, k=2))


def leak(epsilon: float, k: int) -> ChunkProblem:
    """States +1 and −1, both absorbing; the model leaks from + to − with probability ε per step."""
    step = np.eye(2)[:, None, :]
    model = step.copy()
    model[0, 0] = [1 - epsilon, epsilon]
    only = np.ones((2, 1))
    reward, initial = np.array([[1.0], [-1.0]]), np.array([1.0, 0.0])
    return chunk_problem(step, reward, initial, model, only, only, k=k)


def _four_states():
    """A kernel that stays, chunk policies that take chunk 00, and a start in state 0."""
    step = np.repeat(np.eye(4)[:, None, :], 2, axis=1)
    always = np.tile(np.array([1.0, 0.0, 0.0, 0.0]), (4, 1))
    return step, always, np.array([1.0, 0.0, 0.0, 0.0])


def unseen_chunk(epsilon: float) -> ChunkProblem:
    """State 0 earns 1, state 1 earns −1 and absorbs. Action 0 stays in 0; action 1 goes to state 2
    (earns 1), from where 0 returns and 1 falls to state 1. So chunk 11 falls and chunk 10 comes
    back; the data policy never takes 10, and the chunk model believes that it falls."""
    step, always, initial = _four_states()
    step[0, 1] = [0.0, 0.0, 1.0, 0.0]
    step[2] = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    reward = np.array([[1.0] * 2, [-1.0] * 2, [1.0] * 2, [0.0] * 2])
    model = np.array(tabular.chunk_kernel(step, 2))
    model[0, 2] = [0.0, 1.0, 0.0, 0.0]
    data, policy = always.copy(), always.copy()
    data[0] = [1 - epsilon, 0.0, 0.0, epsilon]
    policy[0] = [1 - epsilon, 0.0, epsilon, 0.0]
    return chunk_problem(step, reward, initial, step, data, policy, k=2, chunk_model=model)


def detour() -> ChunkProblem:
    """0 → 1 → 0 in truth, 0 → 2 → 0 in the model; rewards +1, +1, −1."""
    step, always, initial = _four_states()
    step[1], step[2] = [[1.0, 0.0, 0.0, 0.0]] * 2, [[1.0, 0.0, 0.0, 0.0]] * 2
    model = step.copy()
    step[0], model[0] = [[0.0, 1.0, 0.0, 0.0]] * 2, [[0.0, 0.0, 1.0, 0.0]] * 2
    reward = np.array([[1.0] * 2, [1.0] * 2, [-1.0] * 2, [0.0] * 2])
    return chunk_problem(step, reward, initial, model, always, always, k=2)


def late_fall(epsilon: float) -> ChunkProblem:
    """The second action 1 falls from 0 (+1) to 1 (−1, absorbing). The data policy falls with
    probability ε per chunk, the current one never; the model is exact."""
    step, always, initial = _four_states()
    step[0, 1] = [0.0, 1.0, 0.0, 0.0]
    reward = np.array([[1.0] * 2, [-1.0] * 2, [0.0] * 2, [0.0] * 2])
    data = always.copy()
    data[0] = [1 - epsilon, epsilon, 0.0, 0.0]
    return chunk_problem(step, reward, initial, step, data, always, k=2)
