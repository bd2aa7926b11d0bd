"""The few records that flow between the rooms of the package.

Shape letters: ``*B`` any batch axes, ``k`` environment steps in an action chunk, ``A`` action
dimensions, ``P`` proprioception dimensions, ``L`` tokens of a prompt, ``n`` chunks of a branch.
Everything in an `Observation` or an action chunk is in the robot's raw units (uint8 pixels, metres,
radians); every model owns its own normalisation.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import struct

from mbpo_jax.episode import Episode as Episode

Array = jax.Array | np.ndarray
Params = Any  # a nested dict of arrays


@struct.dataclass
class Prompt:
    """Token ids, right-padded: `tokens` int32 [*B, L], `mask` bool [*B, L] (True = real token)."""

    tokens: Array
    mask: Array


@struct.dataclass
class Observation:
    """What the robot sees at a chunk boundary.

    images: camera name -> uint8 [*B, H, W, 3], upright.
        The order of cameras is a matter of config; a dict has none under JAX.
    proprio: float32 [*B, P], raw units, named by the robot's `Embodiment`.
    prompt: the instruction in the policy's tokens.
    world_prompt: the instruction in the world model's tokens.
    """

    images: Mapping[str, Array]
    proprio: Array
    prompt: Prompt
    world_prompt: Prompt


@struct.dataclass
class WorldState:
    """An observation, and in `memory` what the world model keeps of it: a pytree whose leaves have
    the same leading axes [*B], or None."""

    observation: Observation
    memory: Any = None


@struct.dataclass
class Demonstration:
    """A supervised pair for the policy: `actions` float32 [*B, k, A] are the labels; `quality`
    float32 [*B] says how well their episode went on, from 0 to 1 (success), for policies that are
    conditioned on it."""

    observation: Observation
    actions: Array
    quality: Array


@struct.dataclass
class Transition:
    """One chunk of real experience: `actions` float32 [*B, k, A] were sent to the robot at
    `observation`; `next_images` and `next_proprio` were seen k steps later, or at success if that
    came first."""

    observation: Observation
    actions: Array
    next_images: Mapping[str, Array]
    next_proprio: Array


@struct.dataclass
class RewardExample:
    """A frame and whether the task was done there: `label` float32 [*B], 0 or 1."""

    observation: Observation
    label: Array


@struct.dataclass
class ActionSample:
    """A sampled chunk: `actions` float32 [*B, k, A] in the robot's units; `chain`, the denoising
    states that `Policy.log_prob` needs to recompute `log_prob` [*B]."""

    actions: Array
    chain: Any
    log_prob: Array


@struct.dataclass
class Branch:
    """An imagined branch of n chunks from each of M start states; leading axes [n, M].

    `observation` is where each chunk began. `reward`, `done` and `mask` are float32: the reward
    decoded at the chunk's end, times what a reward at a chunk's last step counts (the paper's
    γ^(k-1)); whether the branch ended there; and 0 for chunks after that end. `last_observation`
    and its value `bootstrap_value` (leading axis [M]) follow the last chunk. `advantage` and
    `returns` are None until they are computed from the rest.

    As chunks to learn from (`mbpo.flattened`) the leading axis is [n * M], and there is no
    `last_observation` and no `bootstrap_value`.
    """

    observation: Observation
    chain: Any
    actions: Array
    log_prob: Array
    value: Array
    reward: Array
    done: Array
    mask: Array
    last_observation: Observation | None
    bootstrap_value: Array | None
    advantage: Array | None = None
    returns: Array | None = None


class Policy(Protocol):
    """A distribution over action chunks with a value function. All functions are pure."""

    def encode(self, params: Params, observation: Observation) -> Any:
        """The prefix: KV cache and features, computed once per observation."""

    def sample(self, params: Params, prefix: Any, key: Array) -> ActionSample:
        """A stochastic chunk with its log-probability."""

    def log_prob(self, params: Params, prefix: Any, chain: Any) -> Array:
        """Log-probability [*B] of a stored chain under `params`."""

    def value(self, params: Params, prefix: Any) -> Array:
        """Critic value [*B]."""


class WorldModel(Protocol):
    """Imagination, chunk by chunk. All functions are pure."""

    def precompute(self, params: Params, observation: Observation, key: Array) -> Any:
        """The part of `encode` that is worth keeping for observations that imagination starts from
        more than once: a pytree with leading axes [*B], or None."""

    def encode(
        self, params: Params, observation: Observation, key: Array, precomputed: Any = None
    ) -> WorldState:
        """Where imagination starts: what steps need of a real observation, computed once."""

    def step(self, params: Params, state: WorldState, actions: Array, key: Array) -> WorldState:
        """The state k environment steps later, every view."""

    def success_probability(self, params: Params, state: WorldState) -> Array:
        """Probability [*B] that the task is done."""
