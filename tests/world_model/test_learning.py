"""What world models learn in seconds: a moving square, a bright frame."""

import jax
import numpy as np
import optax

from mbpo_jax.types import RewardExample, Transition
from mbpo_jax.world_model import metrics

from .conftest import CAMERAS, SIZE, make_composed_world, make_observation, make_world

KEY = jax.random.key(3)


def moving_squares(rng, count):
    """A bright square that the first action moves; the wrist view is the head view mirrored."""
    start = rng.integers(2, 8, (count, 2))
    step = rng.integers(-2, 3, (count, 2))

    def draw(corner):
        images = np.full((count, SIZE, SIZE, 3), 40, np.uint8)
        for image, (row, column) in zip(images, corner):
            image[row : row + 6, column : column + 6] = 220
        return {"head": images, "wrist": images[:, :, ::-1].copy()}

    observation = make_observation(batch=(count,)).replace(images=draw(start))
    chunk = np.repeat(step[:, None] / 2.0, 3, axis=1).astype(np.float32)
    observation = observation.replace(proprio=start.astype(np.float32))
    return Transition(observation, chunk, draw(start + step), (start + step).astype(np.float32))


def train(loss_fn, params, batches, learning_rate):
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(params, state, batch, key):
        gradient = jax.grad(loss_fn)(params, batch, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i, batch in enumerate(batches):
        params, state = step(params, state, batch, jax.random.key(i))
    return params


def trained_on(world, fresh, data, rng):
    """The parameters `fresh` after 200 batches of 32 transitions of `data`."""
    frozen = {k: v for k, v in fresh.items() if k in world.frozen}
    trained = {k: v for k, v in fresh.items() if k not in world.frozen}
    rows = (rng.integers(len(data.actions), size=32) for _ in range(200))
    picks = (jax.tree.map(lambda x, i=i: x[i], data) for i in rows)
    trained = train(
        lambda p, b, k: world.dynamics_loss({**p, **frozen}, b, k)[0], trained, picks, 3e-3
    )
    return {**trained, **frozen}


def test_latents_of_a_moving_square():
    world = make_world(train_timestep_shift=4.0, targets_per_example=2, proprio_dim=2)
    rng = np.random.default_rng(0)
    data, held_out = moving_squares(rng, 512), moving_squares(rng, 128)
    fresh = {**world.init(jax.random.key(0)), "statistics": world.measured(data)}
    trained = trained_on(world, fresh, data, rng)
    losses = jax.jit(lambda params: world.dynamics_loss(params, held_out, KEY)[1])
    before, after = losses(fresh), losses(trained)
    # Of a picture's velocity the noise cannot be known, of proprioception everything.
    for name in before:
        share = 0.1 if name == "dynamics/proprio" else 0.9
        assert after[name] < share * before[name], (before, after)


def test_composed_pixels_of_a_moving_square():
    world = make_composed_world(proprio_dim=2)
    rng = np.random.default_rng(0)
    data = moving_squares(rng, 512)
    fresh = {**world.init(jax.random.key(0)), "statistics": world.measured(data)}
    trained = trained_on(world, fresh, data, rng)
    held_out = moving_squares(rng, 128)
    imagined = metrics.imagine_chunk(world, trained, held_out, KEY)
    for camera in CAMERAS:
        now, truth = held_out.observation.images[camera], held_out.next_images[camera]
        assert metrics.unexplained(now, imagined.images[camera], truth) < 0.4


def test_reward_learns_a_bright_frame(world):
    rng = np.random.default_rng(0)
    fresh = world.init(jax.random.key(0))
    label = (np.arange(64) % 2).astype(np.float32)
    observation = make_observation(batch=(64,))
    images = {**observation.images}
    images["head"] = (images["head"] // 2 + 100 * label[:, None, None, None]).astype(np.uint8)
    example = RewardExample(observation.replace(images=images), label)
    picks = (jax.tree.map(lambda x, i=i: x[i], example) for i in rng.integers(64, size=(60, 32)))
    params = train(lambda p, b, k: world.reward_loss(p, b)[0], fresh, picks, 2e-3)
    probability = jax.jit(metrics.judge(world))(params, example.observation)
    assert metrics.classification(probability, label)["f1"] > 0.95
