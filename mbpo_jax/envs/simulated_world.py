"""The simulator as the world model: what policy optimisation would do with an exact one.

`imagine` runs on it as on UMM-World. A step is a call from the compiled program to the worker pool,
where the episode that a start state was recorded in is executed once more up to there, and then the
branch's chunks; so it is slow, exact to the bit, and needs no parameters.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mbpo_jax.envs.requests import BranchRequest, EpisodeRequest
from mbpo_jax.envs.workers.pool import EnvPool
from mbpo_jax.episode import Episode
from mbpo_jax.types import Array, Observation, Params, WorldState


@struct.dataclass
class SimulatedMemory:
    """The number of the recorded moment int32 [B], the chunks executed since float32
    [B, n, k, A] (the first `count` int32 [B] of n), and whether the task is done float32 [B]."""

    moment: Array
    chunks: Array
    count: Array
    done: Array


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
        self._pool, self._branch_chunks = pool, branch_chunks
        # JAX logs the traceback of what a callback raises, and raises it; the pool tells it once.
        logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
        self._requests: list[tuple[EpisodeRequest, np.ndarray]] = []
        self._moments: dict[bytes, int] = {}
        for episode in episodes:
            if can_repeat(episode):
                self._remember(episode)
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
        moment = jax.pure_callback(
            self._find,
            jax.ShapeDtypeStruct(batch, jnp.int32),
            observation.proprio,
            dict(observation.images),
            vmap_method="broadcast_all",
        )
        memory = SimulatedMemory(
            moment,
            jnp.zeros((*batch, self._branch_chunks, *self._chunk_shape)),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(batch),
        )
        return WorldState(observation, memory)

    def step(self, params: Params, state: WorldState, actions: Array, key: Array) -> WorldState:
        """Executes the branch up to the end of this chunk, or to success."""
        now, memory = state.observation, state.memory
        latest = jnp.arange(self._branch_chunks) == memory.count[:, None]
        chunks = jnp.where(latest[..., None, None], actions[:, None], memory.chunks)
        memory = memory.replace(chunks=chunks, count=memory.count + 1)
        views = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in now.images.items()}
        proprio = jax.ShapeDtypeStruct(now.proprio.shape, jnp.float32)
        images, proprio, done = jax.pure_callback(
            self._execute,
            (views, proprio, jax.ShapeDtypeStruct(memory.done.shape, jnp.float32)),
            memory.moment,
            memory.chunks,
            memory.count,
            vmap_method="broadcast_all",
        )
        observation = now.replace(images=images, proprio=proprio)
        return WorldState(observation, memory.replace(done=done))

    def success_probability(self, params: Params, state: WorldState) -> Array:
        """1 where the simulator says that the task is done."""
        return state.memory.done

    def _remember(self, episode: Episode) -> None:
        sent = executed_actions(episode)
        self._chunk_shape = episode.actions.shape[1:]
        start = EpisodeRequest(
            task_id=episode.task_id,
            seed=episode.seed,
            init_state_id=episode.init_state_id,
            max_steps=len(sent) + self._branch_chunks * len(episode.actions[0]) + 1,
        )
        for f in np.flatnonzero(episode.num_actions):
            views = {name: x[f] for name, x in episode.images.items()}
            self._moments[_fingerprint(episode.proprio[f], views)] = len(self._requests)
            self._requests.append((start, sent[: episode.timesteps[f]]))

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

    def _execute(self, moment: Array, chunks: Array, count: Array):
        batch = moment.shape
        moment, count = np.asarray(moment).ravel(), np.asarray(count).ravel()
        chunks = np.asarray(chunks).reshape(len(moment), self._branch_chunks, *self._chunk_shape)
        rows_of: dict[BranchRequest, np.ndarray] = {}
        for start, length in sorted(set(zip(moment.tolist(), count.tolist()))):
            rows = np.flatnonzero((moment == start) & (count == length))
            actions = chunks[rows, :length].reshape(len(rows), -1, self._chunk_shape[1])
            rows_of[BranchRequest(*self._requests[start], actions)] = rows
        seen: dict[str, np.ndarray] = {}
        for request, result in self._pool.branches(rows_of):
            parts = {**result.images, "": result.proprio, "done": result.success.astype(np.float32)}
            for name, x in parts.items():
                whole = seen.setdefault(name, np.zeros((len(moment), *x.shape[1:]), x.dtype))
                whole[rows_of[request]] = x
        seen = {name: x.reshape(*batch, *x.shape[1:]) for name, x in seen.items()}
        proprio, done = seen.pop(""), seen.pop("done")
        return seen, proprio, done  # what is left are the views


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
