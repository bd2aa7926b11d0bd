"""Probes read the gripper from seen and from imagined views, however faint, and not a stuck one."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs.libero_long import get_config
from mbpo_jax.data.pipelines import collate_some, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.stages.build import observation_builder
from mbpo_jax.stages.gripper import gripper_errors
from mbpo_jax.types import WorldState
from mbpo_jax.world_model import metrics

SIDE = 32  # pixels, 1 cm each


def view(position, brightness=200.0):
    """A bright spot at the position [..., 2] (metres) of a plane."""
    row, column = jnp.meshgrid(jnp.arange(SIDE), jnp.arange(SIDE), indexing="ij")
    at = 100.0 * position[..., None, None]
    spot = jnp.exp(
        -(jnp.square(row - at[..., 0, :, :]) + jnp.square(column - at[..., 1, :, :])) / 8
    )
    return jnp.broadcast_to((brightness * spot)[..., None], (*spot.shape, 3)).astype(jnp.uint8)


class SpotWorld:
    """The gripper goes where the actions say, and is drawn `brightness` bright."""

    def __init__(self, brightness, moves=True):
        self.brightness, self.moves = brightness, moves

    def encode(self, params, observation, key, precomputed=None):
        return WorldState(observation)

    def step(self, params, state, actions, key):
        seen = state.observation
        position = seen.proprio[:, :2] + actions[..., :2].sum(1) * self.moves
        views = {name: view(position, self.brightness) for name in seen.images}
        return WorldState(seen.replace(images=views))


def episode(config, seed):
    rng = np.random.default_rng(seed)
    position = rng.uniform(0.05, 0.25, (40, 2)).astype(np.float32)
    actions = np.zeros((40, config.chunk, config.action_dim), np.float32)
    actions[:-1, :, :2] = np.diff(position, axis=0)[:, None] / config.chunk
    return Episode(
        suite=config.suite,
        task_id=5,
        instruction="move the spot",
        source="expert",
        seed=seed,
        init_state_id=-1,
        success=True,
        length=39 * config.chunk,
        goal_fraction=1.0,
        timesteps=np.arange(40, dtype=np.int32) * config.chunk,
        images={camera: np.asarray(view(position)) for camera in config.cameras},
        proprio=np.pad(position, ((0, 0), (0, 6))),
        actions=actions,
        target_actions=actions,
        num_actions=np.full(40, config.chunk, np.int32),
    )


@pytest.mark.parametrize(
    ("world", "low", "high"), [(SpotWorld(60.0), 0.0, 1.5), (SpotWorld(60.0, False), 5.0, 20.0)]
)
def test_a_faint_gripper_is_read_and_a_stuck_one_is_not(world, low, high):
    config = get_config("tiny")
    builder = observation_builder(config)
    train, held_out = [episode(config, i) for i in range(20)], [episode(config, 100)]
    chosen = collate_some(transitions(held_out, builder, config.chunk), 100)
    imagined = metrics.imagine_chunk(world, None, chosen, jnp.zeros(2, jnp.uint32)).images
    errors = gripper_errors(world, None, train, builder, chosen, imagined)
    assert set(errors) == set(config.cameras)
    for found in errors.values():
        assert found["real"] < 1.5
        assert low <= found["imagined"] <= high
