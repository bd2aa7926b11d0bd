"""The simulator as the world model: what policy optimisation would do with an exact one.

`imagine` runs on it as on UMM-World. A step is a call from the compiled program to the worker pool.
The episode that a start state was recorded in is repeated up to there; from then on the simulator's
states are kept here, and every chunk is executed once. Exact to the bit, slow, without parameters.
"""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mbpo_jax.envs.requests import BranchRequest, EpisodeRequest
from mbpo_jax.envs.workers.pool import EnvPool
from mbpo_jax.episode import Episode
from mbpo_jax.types import Array, Observation, Params, WorldState

_KEPT = 16_384  # newest states of the simulator, of some 10 kB each


@struct.dataclass
class SimulatedMemory:
    """The number of the place where the branch is, int32 [B], and whether the task is done there,
    float32 [B]."""

    place: Array
    done: Array


@dataclasses.dataclass
class _Place:
    """A state of the simulator in the episode that began with `start`; while it is None, what the
    actions `before` [t, A] lead to."""

    start: EpisodeRequest
    before: np.ndarray
    state: Any = None


class SimulatedWorld:
    """Implements `mbpo_jax.types.WorldModel`, without parameters, from the moments of episodes.

    Args:
        pool: workers of the episodes' suite.
        episodes: recorded in the simulator by a policy, whose every action is known.
        branch_chunks: the most chunks that a branch will have.

    Raises:
        ValueError: there is no episode that the simulator can repeat.
    """

    def __init__(self, pool: EnvPool, episodes: Sequence[Episode], branch_chunks: int):
        self._pool = pool
        # JAX logs the traceback of what a callback raises, and raises it; the pool tells it once.
        logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
        self._places: dict[int, _Place] = {}
        self._moments: dict[bytes, int] = {}
        for episode in episodes:
            if can_repeat(episode):
                self._remember(episode, branch_chunks)
        self._recorded = len(self._places)
        self._numbers = itertools.count(self._recorded)
        if not self._moments:
            raise ValueError(
                f"none of the {len(episodes)} episodes can be continued in the simulator: that "
                "needs the seed or initial state that an episode began with and every action from "
                "there on, which imported data and demonstrations lack; use the rollouts of a run"
            )

    def knows(self, observation: Observation) -> bool:
        """Whether one observation, without a batch axis, was recorded in an episode that can be
        continued."""
        return _fingerprint(observation.proprio, observation.images) in self._moments

    def precompute(self, params: Params, observation: Observation, key: Array) -> None:
        return None

    def encode(
        self, params: Params, observation: Observation, key: Array, precomputed: None = None
    ) -> WorldState:
        """Finds the moment. Raises ValueError where the observation was not recorded in one of the
        episodes."""
        batch = observation.proprio.shape[:1]
        place = jax.pure_callback(
            self._find,
            jax.ShapeDtypeStruct(batch, jnp.int32),
            observation.proprio,
            dict(observation.images),
            vmap_method="broadcast_all",
        )
        return WorldState(observation, SimulatedMemory(place, jnp.zeros(batch)))

    def step(self, params: Params, state: WorldState, actions: Array, key: Array) -> WorldState:
        """Executes a chunk, up to its end or to success."""
        now, memory = state.observation, state.memory
        views = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in now.images.items()}
        proprio = jax.ShapeDtypeStruct(now.proprio.shape, jnp.float32)
        place = jax.ShapeDtypeStruct(memory.place.shape, jnp.int32)
        done = jax.ShapeDtypeStruct(memory.done.shape, jnp.float32)
        images, proprio, place, done = jax.pure_callback(
            self._execute,
            (views, proprio, place, done),
            memory.place,
            actions,
            vmap_method="broadcast_all",
        )
        observation = now.replace(images=images, proprio=proprio)
        return WorldState(observation, SimulatedMemory(place, done))

    def success_probability(self, params: Params, state: WorldState) -> Array:
        """1 where the simulator says that the task is done."""
        return state.memory.done

    def _remember(self, episode: Episode, branch_chunks: int) -> None:
        sent = executed_actions(episode)
        start = EpisodeRequest(
            task_id=episode.task_id,
            seed=episode.seed,
            init_state_id=episode.init_state_id,
            max_steps=len(sent) + branch_chunks * len(episode.actions[0]) + 1,
        )
        for f in np.flatnonzero(episode.num_actions):
            views = {name: x[f] for name, x in episode.images.items()}
            self._moments[_fingerprint(episode.proprio[f], views)] = len(self._places)
            self._places[len(self._places)] = _Place(start, sent[: episode.timesteps[f]])

    def _keep(self, start: EpisodeRequest, state: Any) -> int:
        number = next(self._numbers)
        self._places[number] = _Place(start, np.zeros(0), state)
        if number - _KEPT >= self._recorded:
            del self._places[number - _KEPT]
        return number

    def _find(self, proprio: Array, images: dict[str, Array]) -> np.ndarray:
        batch = proprio.shape[:-1]
        proprio = np.asarray(proprio).reshape(-1, proprio.shape[-1])
        views = {name: np.asarray(x).reshape(-1, *x.shape[-3:]) for name, x in images.items()}
        found = np.zeros(len(proprio), np.int32)
        for i in range(len(proprio)):
            seen = _fingerprint(proprio[i], {name: x[i] for name, x in views.items()})
            if seen not in self._moments:
                raise ValueError("a start state was not recorded in an episode of the simulator")
            found[i] = self._moments[seen]
        return found.reshape(batch)

    def _execute(self, place: Array, actions: Array):
        batch, place = place.shape, np.asarray(place).ravel()
        actions = np.asarray(actions).reshape(len(place), *actions.shape[-2:])
        if gone := set(place.tolist()) - self._places.keys():
            raise ValueError(
                f"the simulator's state behind a branch (number {min(gone)}) is no longer kept: "
                f"imagine at most {_KEPT} branches at a time (rl.imagination_batch)"
            )
        places = [self._places[number] for number in place.tolist()]
        groups: dict[tuple[EpisodeRequest, int], list[int]] = {}  # a worker resets once for each
        for row, x in enumerate(places):
            groups.setdefault((x.start, len(x.before) if x.state is None else -1), []).append(row)
        rows_of = {
            BranchRequest(
                start, places[rows[0]].before, actions[rows], [places[row].state for row in rows]
            ): rows
            for (start, _), rows in groups.items()
        }
        seen: dict[str, np.ndarray] = {}
        for request, result in self._pool.branches(rows_of):
            rows = rows_of[request]
            for row in rows:
                if places[row].state is None:
                    places[row].state = result.moment
            kept = [self._keep(request.start, state) for state in result.states]
            parts = {
                **result.images,
                "proprio": result.proprio,
                "place": np.array(kept, np.int32),
                "done": result.success.astype(np.float32),
            }
            for name, x in parts.items():
                whole = seen.setdefault(name, np.zeros((len(place), *x.shape[1:]), x.dtype))
                whole[rows] = x
        seen = {name: x.reshape(*batch, *x.shape[1:]) for name, x in seen.items()}
        rest = [seen.pop(name) for name in ("proprio", "place", "done")]
        return seen, *rest  # what is left are the views


def can_repeat(episode: Episode) -> bool:
    """Whether the simulator can execute the episode once more."""
    has_start = (episode.seed >= 0) != (episode.init_state_id >= 0)
    return has_start and episode.source != "expert" and executed_actions(episode) is not None


def executed_actions(episode: Episode) -> np.ndarray | None:
    """The actions [T, A] of the whole episode; None where its frames are too far apart, or the
    first too late, to have stored each."""
    sent = np.zeros((episode.length, episode.actions.shape[-1]), np.float32)
    known = np.zeros(episode.length, bool)
    for start, actions, count in zip(episode.timesteps, episode.actions, episode.num_actions):
        sent[start : start + count], known[start : start + count] = actions[:count], True
    return sent if known.all() else None


def _fingerprint(proprio: Array, images: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256(np.asarray(proprio, np.float32).tobytes())
    for name in sorted(images):
        digest.update(np.ascontiguousarray(images[name]).tobytes())
    return digest.digest()
