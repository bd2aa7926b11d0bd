"""Random chunk problems, in families that strain a bound in different ways.

dense: every transition likely. sparse: few successors. deterministic: nearly one successor.
absorbing: states that are hardly ever left, where errors last longest. cycle: nearly periodic
chains, whose state distribution hardly settles.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.theory import checks
from experiments.theory.tabular import ChunkProblem, chunk_kernel


class Family(NamedTuple):
    """The true kernel is a softmax of normal logits times `scale`, mixed with staying put
    (`stay`) and with moving to the next state of a ring (`turn`)."""

    scale: float
    stay: float
    turn: float


FAMILIES = {
    "dense": Family(1.0, 0.0, 0.0),
    "sparse": Family(4.0, 0.0, 0.0),
    "deterministic": Family(30.0, 0.0, 0.0),
    "absorbing": Family(2.0, 0.97, 0.0),
    "cycle": Family(2.0, 0.0, 0.97),
}
# Smallest random perturbation of a model or a policy, in log10; the largest replaces it.
_LOG_SMALLEST = -3.0
# Logits of what a model or a policy is mixed with: nearly one-hot, the worst an error can be.
_PEAKED = 10.0


def family(name: str) -> Family:
    """The family called `name`; ValueError naming the nearest known one otherwise."""
    checks.check_choice("family", name, tuple(FAMILIES))
    return FAMILIES[name]


def random_problem(key: Array, kind: Family, *, states: int, actions: int, k: int) -> ChunkProblem:
    """One random problem with |r| ≤ 1; pure, to be mapped over keys (and over `kind`'s numbers).

    Models and the current policy are mixtures of the truth (the data policy) with something
    else. By how much is log-uniform, and half of the rows are left alone, so that errors sit
    where the data policy may not look. The chunk model errs independently of the step model.
    """
    checks.check_chunk(k)
    chunks = actions**k
    shapes = {
        "step": (states, actions, states),
        "step_other": (states, actions, states),
        "chunk_other": (states, chunks, states),
        "data_policy": (states, chunks),
        "policy_other": (states, chunks),
        "initial": (states,),
    }
    uniforms = {
        "reward": (states, actions),
        "extreme": (),
        "sizes": (3,),
        "step_rows": (states, actions),
        "chunk_rows": (states, chunks),
        "policy_rows": (states,),
    }
    # One draw of each kind, cut up: a program with a dozen draws takes half a minute to compile.
    normal_key, uniform_key = jax.random.split(key)
    normal = _cut(jax.random.normal(normal_key, (_size(shapes),)), shapes)
    uniform = _cut(jax.random.uniform(uniform_key, (_size(uniforms),)), uniforms)
    sizes = 10.0 ** (_LOG_SMALLEST * uniform["sizes"])

    def perturb(table, size, rows, other):
        weight = (size * (rows < 0.5))[..., None]
        return (1 - weight) * table + weight * jax.nn.softmax(_PEAKED * other)

    eye = jnp.eye(states)
    ring = kind.stay * eye + kind.turn * jnp.roll(eye, 1, axis=1)
    random_step = jax.nn.softmax(kind.scale * normal["step"])
    step = (1 - kind.stay - kind.turn) * random_step + ring[:, None, :]
    data_policy = jax.nn.softmax(2.0 * normal["data_policy"])
    reward = 2 * uniform["reward"] - 1
    # Rewards of the extreme sign are a bound's worst case, so half of the problems have them.
    reward = jnp.where(uniform["extreme"] < 0.5, jnp.sign(reward), reward)
    return ChunkProblem(
        step=step,
        reward=reward,
        initial=jax.nn.softmax(3.0 * normal["initial"]),
        step_model=perturb(step, sizes[0], uniform["step_rows"], normal["step_other"]),
        chunk_model=perturb(
            chunk_kernel(step, k), sizes[1], uniform["chunk_rows"], normal["chunk_other"]
        ),
        data_policy=data_policy,
        policy=perturb(data_policy, sizes[2], uniform["policy_rows"], normal["policy_other"]),
    )


def _size(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _cut(flat: Array, shapes) -> dict[str, Array]:
    pieces, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        pieces[name] = flat[start : start + size].reshape(shape)
        start += size
    return pieces
