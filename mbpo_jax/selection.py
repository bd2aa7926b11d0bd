"""Acting by choice: several chunks are imagined, and the one that promises most is executed.

No training: it says what the world model and the value know, and what policy optimisation could
put into the weights (best of N as in MAC; model-predictive control with a policy's proposals).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mbpo_jax.types import Array, Observation, Params, WorldModel

CHOICES = ("worst", "random", "best")


def chunk_scores(done: Array, value: Array, discount: float, reward_weight: float) -> Array:
    """Expected return of chunks: w p + (1 - p) γ V(s'), of P(done) and the value at their ends."""
    return reward_weight * done + (1.0 - done) * discount * value


@struct.dataclass
class Proposals:
    """Imagined branches of n chunks from one observation, as many as are compared.

    observation, actions: before each chunk, and the chunk: leading axes [n, count].
    going_on: probability [n, count] that the task is not done before the chunk.
    score: expected return [count], with the value of where a branch ends.
    """

    observation: Observation
    actions: Array
    going_on: Array
    score: Array


def proposals(
    policy: Any, world: WorldModel, count: int, discount: float, reward_weight: float, chunks: int
) -> Callable[[Params, Observation, Array], Proposals]:
    """The function `(params, observation [1], key) -> Proposals` of what `policy.act` would do; the
    first branch begins with what it gives for this key.

    Branches have `chunks` chunks. params are {"policy": who samples, "value": whose critic judges,
    "world": the world model's}.

    Raises:
        ValueError: fewer than one chunk.
    """
    if count < 1:
        raise ValueError(f"best_of is {count}: choose among 1 chunk or more")
    if chunks < 1:
        raise ValueError(f"best_of_chunks is {chunks}: imagine 1 chunk or more")

    def propose(params: Params, observation: Observation, key: Array) -> Proposals:
        keys = jnp.stack([key, *(jax.random.fold_in(key, i) for i in range(1, count))])
        act = partial(policy.act, params["policy"], observation)
        actions = jax.vmap(lambda k: act(k)[0])(keys)
        key = jax.random.fold_in(key, count)
        state = world.encode(params["world"], observation, key)
        state = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), state)
        before, done, going_on = [], [], [jnp.ones(count)]
        for i in range(chunks):
            act_key, world_key = jax.random.split(jax.random.fold_in(key, i))
            if i:
                actions = policy.act(params["policy"], state.observation, act_key)
            before.append((state.observation, actions))
            state = world.step(params["world"], state, actions, world_key)
            done.append(world.success_probability(params["world"], state))
            going_on.append(going_on[-1] * (1 - done[-1]))
        score = policy.value(params["value"], policy.encode(params["value"], state.observation))
        for probability in reversed(done):
            score = chunk_scores(probability, score, discount, reward_weight)
        observations, executed = jax.tree.map(lambda *x: jnp.stack(x), *before)
        return Proposals(observations, executed, jnp.stack(going_on[:-1]), score)

    return propose


def best_of(
    policy: Any,
    world: WorldModel,
    count: int,
    discount: float,
    reward_weight: float,
    choice: str = "best",
    chunks: int = 1,
) -> Callable[[Params, Observation, Array], Array]:
    """The acting function `(params, observation [1], key) -> actions [1, k, A]`: of `count`
    `proposals` the one with the highest (or lowest) expected return, or a "random" one.

    Raises:
        ValueError: fewer than one chunk, or an unknown choice.
    """
    propose = proposals(policy, world, count, discount, reward_weight, chunks)
    if choice not in CHOICES:
        raise ValueError(f"choice is {choice!r}; there are {', '.join(CHOICES)}")
    pick = jnp.argmin if choice == "worst" else jnp.argmax

    def act(params: Params, observation: Observation, key: Array) -> Array:
        if count == 1:
            return policy.act(params["policy"], observation, key)
        found = propose(params, observation, key)
        samples = found.actions[0]
        if choice == "random":
            return samples[jax.random.randint(jax.random.fold_in(key, 0), (1,), 0, count)]
        return samples[pick(found.score)][None]

    return act
