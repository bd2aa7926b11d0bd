"""Imagining a chunk in several shorter predictions, as video models do frame by frame."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mbpo_jax.types import Observation, Params, WorldModel


class FrameByFrame:
    """A `WorldModel` of long chunks that calls one of short chunks `predictions` times in a row:
    what frame skipping (arXiv 2603.20607, section 4.1) is compared with."""

    def __init__(self, world: WorldModel, predictions: int):
        self.world, self.predictions = world, predictions

    def step(
        self, params: Params, observation: Observation, actions: Array, key: Array
    ) -> Observation:
        """As `WorldModel.step`; the chunk's length must be a multiple of `predictions`."""
        for part in jnp.split(actions, self.predictions, axis=-2):
            key, now = jax.random.split(key)
            observation = self.world.step(params, observation, part, now)
        return observation

    def reward(self, params: Params, observation: Observation) -> Array:
        return self.world.reward(params, observation)
