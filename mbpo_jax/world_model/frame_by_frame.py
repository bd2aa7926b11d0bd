"""Imagining a chunk in several shorter predictions, as video models do frame by frame."""

from typing import Any

import jax
import jax.numpy as jnp

from mbpo_jax.shapes import Array
from mbpo_jax.types import Observation, Params, WorldModel, WorldState


class FrameByFrame:
    """A `WorldModel` of long chunks that calls one of short chunks `predictions` times in a row:
    what frame skipping (arXiv 2603.20607, section 4.1) is compared with."""

    def __init__(self, world: WorldModel, predictions: int):
        self.world, self.predictions = world, predictions

    def precompute(self, params: Params, observation: Observation, key: Array) -> Any:
        """As `WorldModel.precompute`."""
        return self.world.precompute(params, observation, key)

    def encode(
        self, params: Params, observation: Observation, key: Array, precomputed: Any = None
    ) -> WorldState:
        return self.world.encode(params, observation, key, precomputed)

    def step(self, params: Params, state: WorldState, actions: Array, key: Array) -> WorldState:
        """As `WorldModel.step`; the chunk's length must be a multiple of `predictions`."""
        for part in jnp.split(actions, self.predictions, axis=-2):
            key, now = jax.random.split(key)
            state = self.world.step(params, state, part, now)
        return state

    def success_probability(self, params: Params, state: WorldState) -> Array:
        return self.world.success_probability(params, state)
