"""The simulator as a world model repeats, to the bit, what really happened."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.envs import simulated_world
from mbpo_jax.envs.requests import BranchRequest, EpisodeRequest
from mbpo_jax.envs.simulated_world import SimulatedWorld, can_repeat
from mbpo_jax.envs.workers.pool import EnvPool, WorkerError
from mbpo_jax.types import Observation, Prompt

pytestmark = pytest.mark.libero


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("libero", reason="the simulator is not installed (extra: libero)")
    with EnvPool("libero_10", 1, image_size=32) as pool:
        yield pool


@pytest.fixture(scope="module")
def episode(pool):
    """Five chunks that push down onto the objects of the table."""

    def act(queries):
        drawn = [np.random.default_rng(q.chunk_index).uniform(-1, 1, (10, 7)) for q in queries]
        return np.stack(drawn) + np.array([0.3, 0, -0.7, 0, 0, 0, 0])

    request = EpisodeRequest(5, seed=3, max_steps=50, render_every=10)
    return next(pool.policy_episodes([request], act)).episode


def observation(episode, frames):
    prompt = Prompt(np.zeros((len(frames), 1), np.int32), np.ones((len(frames), 1), bool))
    images = {name: x[frames] for name, x in episode.images.items()}
    return Observation(images, episode.proprio[frames], prompt, prompt)


def test_a_branch_of_the_recorded_chunks_is_the_recorded_episode(pool, episode):
    world = SimulatedWorld(pool, [episode], branch_chunks=2)

    @jax.jit
    @jax.vmap
    def two_chunks(start, chunks):
        start = jax.tree.map(lambda x: x[None], start)
        state = world.encode({}, start, jax.random.key(0))
        seen = []
        for chunk in chunks:
            state = world.step({}, state, chunk[None], jax.random.key(0))
            seen.append((state.observation, world.success_probability({}, state)))
        return jax.tree.map(lambda *x: jnp.stack(x)[:, 0], *seen)

    frames = np.array([0, 2, 2, 3])
    chunks = np.stack([episode.actions[frames], episode.actions[frames + 1]], axis=1)
    chunks[1] *= -1  # a branch beside, from the same moment
    seen, done = jax.device_get(two_chunks(observation(episode, frames), chunks))
    for row, chunk in ((0, 0), (0, 1), (2, 0), (2, 1), (3, 0), (3, 1)):
        then = frames[row] + 1 + chunk
        np.testing.assert_array_equal(seen.proprio[row, chunk], episode.proprio[then])
        for name, views in seen.images.items():
            np.testing.assert_array_equal(views[row, chunk], episode.images[name][then])
    assert np.abs(seen.proprio[1, 0] - seen.proprio[2, 0]).max() > 0.01
    assert not done.any()


def test_a_state_goes_on_in_another_process(pool, episode):
    """It has not executed what came before, and it has been in another episode."""
    start, before = EpisodeRequest(5, seed=3), episode.actions[0]
    _, first = next(pool.branches([BranchRequest(start, before, episode.actions[[1]], [None])]))
    drawn = np.random.default_rng(0).uniform(-1, 1, (2, 10, 7))
    with EnvPool("libero_10", 1, image_size=32) as other:
        aside = BranchRequest(EpisodeRequest(5, seed=4), drawn[0], drawn[[1]], [None])
        next(other.branches([aside]))
        then = BranchRequest(start, before, episode.actions[[2]], first.states)
        _, second = next(other.branches([then]))
    assert second.moment is None
    for result, frame in ((first, 2), (second, 3)):
        np.testing.assert_array_equal(result.proprio[0], episode.proprio[frame])
        for name, view in result.images.items():
            np.testing.assert_array_equal(view[0], episode.images[name][frame])


def test_places_beyond_the_newest_are_forgotten(pool, episode, monkeypatch):
    monkeypatch.setattr(simulated_world, "_KEPT", 2)
    world = SimulatedWorld(pool, [episode], branch_chunks=1)
    state = world.encode({}, observation(episode, [0, 1, 1]), jax.random.key(0))
    actions = jnp.asarray(episode.actions[[0, 1, 1]])
    following = world.step({}, state, actions, jax.random.key(0))
    assert following.memory.place.tolist() == [5, 6, 7]  # behind the five moments
    again = jax.tree.map(lambda x: x[1:], following)
    world.step({}, again, actions[1:], jax.random.key(0))
    with pytest.raises(Exception, match=r"number 5.*at most 2 branches"):
        jax.block_until_ready(world.step({}, following, actions, jax.random.key(0)))


def test_only_moments_that_can_be_reached_again_are_starts(pool, episode):
    world = SimulatedWorld(pool, [episode], branch_chunks=1)
    start = jax.tree.map(lambda x: x[0], observation(episode, [1]))
    assert world.knows(start)
    assert not world.knows(start.replace(proprio=start.proprio + 1e-3))
    assert not can_repeat(dataclasses.replace(episode, seed=-1))
    assert not can_repeat(dataclasses.replace(episode, source="expert"))
    late = {f: getattr(episode, f)[1:] for f in ("timesteps", "actions", "num_actions")}
    assert not can_repeat(dataclasses.replace(episode, **late))
    with pytest.raises(ValueError, match="none of the 1 episodes can be continued"):
        SimulatedWorld(pool, [dataclasses.replace(episode, seed=-1)], branch_chunks=1)


def test_what_stops_a_worker_of_a_compiled_program_is_told_once(episode, monkeypatch, caplog):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")

    def imagine():
        with EnvPool("libero_10", 1, image_size=32) as broken:
            world = SimulatedWorld(broken, [episode], branch_chunks=1)

            @jax.jit
            def step(start, chunk):
                state = world.encode({}, start, jax.random.key(0))
                return world.step({}, state, chunk, jax.random.key(0)).observation.proprio

            return jax.device_get(step(observation(episode, [1]), episode.actions[[1]]))

    with pytest.raises(WorkerError, match="MUJOCO") as error:
        imagine()
    assert "Traceback" not in str(error.value) + caplog.text
