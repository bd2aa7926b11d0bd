"""Views composed of pixels: the parts against loops by hand, and what reaches which prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.world_model import composition, metrics
from mbpo_jax.world_model.composed import ComposedWorld
from mbpo_jax.world_model.config import variant

from .conftest import (
    CAMERAS,
    COMPOSED,
    SIZE,
    TINY,
    WordTokenizer,
    actions,
    make_composed_world,
    make_observation,
    make_transition,
)

KEY = jax.random.key(3)
PATCH = COMPOSED.latent_patch


def awaken(params):
    """Parameters with random heads."""

    def one(path, x):
        head = {"out", "llm2proprio"} & {getattr(entry, "key", None) for entry in path}
        return 0.2 * jax.random.normal(KEY, x.shape) if head and x.ndim == 2 else x

    return {**params, "adapters": jax.tree_util.tree_map_with_path(one, params["adapters"])}


@pytest.fixture(scope="module")
def world():
    return make_composed_world()


@pytest.fixture(scope="module")
def params(world):
    return awaken(world.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def step(world):
    return jax.jit(metrics.predictor(world))


def test_warp_against_a_loop():
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(2, 5, 6, 3)).astype(np.float32)
    flow = rng.normal(scale=3, size=(2, 5, 6, 2)).astype(np.float32)
    expected = np.zeros_like(picture)
    for b, row, column in np.ndindex(2, 5, 6):
        y = min(max(row + flow[b, row, column, 0], 0.0), 4.0)
        x = min(max(column + flow[b, row, column, 1], 0.0), 5.0)
        for i, j in np.ndindex(5, 6):
            weight = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
            expected[b, row, column] += weight * picture[b, i, j]
    np.testing.assert_allclose(composition.warp(picture, flow), expected, atol=1e-5)


def test_composition_against_a_loop():
    rng = np.random.default_rng(0)
    side, patch = 2, 3
    size = side * patch
    current = rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    output = rng.normal(size=(1, side * side, composition.output_size(patch))).astype(np.float32)
    output[..., -2:] = [1 / 3, 0.0]  # everywhere the same flow: one pixel downwards
    found = composition.compose(output, current, patch)
    for row, column in np.ndindex(size, size):
        token = output[0, (row // patch) * side + column // patch]
        place = (row % patch) * patch + column % patch
        new, logits = token[3 * place :][:3], token[3 * patch**2 + 3 * place :][:3]
        weights = np.exp(logits + [1.5, 1.5, -1.5])
        weights /= weights.sum()
        moved = current[0, min(row + 1, size - 1), column]
        expected = weights[0] * current[0, row, column] + weights[1] * moved + weights[2] * new
        np.testing.assert_allclose(found[0, row, column], expected, atol=1e-5)


def test_augmentation_changes_both_times_alike():
    picture = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    first, second = composition.augment([picture, picture], KEY, shift=2, colour=0.2)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - picture).mean(axis=(1, 2, 3)).min() > 0.01
    (kept,) = composition.augment([picture], KEY, shift=0, colour=0.0)
    np.testing.assert_array_equal(kept, picture)


def test_a_fresh_model_nearly_copies_the_frame(world, step):
    observation = make_observation()
    following = step(world.init(jax.random.key(0)), observation, actions(), KEY)
    for camera in CAMERAS:  # 2.4 % of each pixel is painted grey
        copied = observation.images[camera].astype(int)
        assert np.abs(following.images[camera].astype(int) - copied).max() <= 4
    np.testing.assert_array_equal(following.proprio, observation.proprio)


def test_actions_reach_every_view_on_their_own(params, step):
    # Of independent views too: no view hears of the actions only through another one.
    observation = make_observation()
    predict = jax.jit(metrics.predictor(make_composed_world(interleaved=False)))
    for program in (step, predict):
        first, second = (program(params, observation, actions(s), KEY) for s in (0, 1))
        for camera in CAMERAS:
            assert np.any(first.images[camera] != second.images[camera])
        assert np.abs(first.proprio - second.proprio).max() > 1e-3


def test_proprioception_and_the_imagined_head_reach_the_wrist(params, step):
    observation = make_observation()
    before = step(params, observation, actions(), KEY).images["wrist"]
    moved = observation.replace(proprio=observation.proprio + 1)
    assert np.any(step(params, moved, actions(), KEY).images["wrist"] != before)
    images = {**observation.images, "head": make_observation(7).images["head"]}
    after = step(params, observation.replace(images=images), actions(), KEY).images["wrist"]
    assert np.any(after != before)


def test_scales_come_from_the_data(world):
    transition = make_transition(batch=(64,))
    scaled = transition.actions * np.array([3.0, 0.01], np.float32) + np.array([0, 0.5], np.float32)
    found = world.measured(transition.replace(actions=scaled))
    expected = scaled.reshape(-1, 2).std(0)
    expected[1] = max(expected[1], 0.01 * expected[0])
    np.testing.assert_allclose(found["actions"]["std"], expected, rtol=1e-5)
    for camera in CAMERAS:
        now, later = transition.observation.images[camera], transition.next_images[camera]
        change = (later.astype(float) - now) / 127.5
        np.testing.assert_allclose(
            found["pixel_change"][camera], np.sqrt(np.square(change).mean()), rtol=1e-4
        )
    # A robot with ten times the units sees the same model.
    wide = [(-10.0, 10.0)] * 2
    other = ComposedWorld(COMPOSED, CAMERAS, SIZE, 2, 3, WordTokenizer(), wide)
    params = awaken(world.init(KEY))
    small = {**params, "statistics": world.measured(transition)}
    large = transition.replace(actions=10 * transition.actions)
    large = {**params, "statistics": other.measured(large)}
    chunk = 0.9 * transition.actions[:2]
    first = jax.jit(world.step)(small, world.encode(small, make_observation(), KEY), chunk, KEY)
    second = jax.jit(other.step)(
        large, other.encode(large, make_observation(), KEY), 10 * chunk, KEY
    )
    np.testing.assert_allclose(
        first.memory["wrist"].pixels, second.memory["wrist"].pixels, atol=1e-4
    )


def test_the_loss_is_a_share_of_the_real_change(world, params):
    # A model that copies scores 1 where the statistics are those of the batch.
    transition = make_transition(batch=(8,))
    copying = {**world.init(KEY), "statistics": world.measured(transition)}
    logits = slice(3 * PATCH**2, 6 * PATCH**2)
    for view in copying["adapters"]["views"].values():
        bias = np.zeros_like(view["out"]["bias"])
        bias[logits] = np.tile([40.0, 0.0, 0.0], PATCH**2)
        view["out"]["bias"] = jnp.asarray(bias)
    _, parts = world.dynamics_loss(copying, transition, KEY)
    for camera in CAMERAS:
        np.testing.assert_allclose(parts[f"dynamics/{camera}"], 1.0, rtol=1e-4)


def test_bad_configurations():
    with pytest.raises(ValueError, match="vae"):
        make_composed_world(vae=TINY.vae)
    with pytest.raises(ValueError, match="vae"):
        make_composed_world(prediction="velocity")
    assert (variant("micro").latent_side, variant("micro").token_size) == (8, 192)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_state_stays_of_one_kind_with_any_number_of_views(count):
    cameras = (*CAMERAS, "third")[:count]
    world = make_composed_world(cameras)
    observation = make_observation()
    images = dict.fromkeys(cameras, observation.images[CAMERAS[0]])
    observation = observation.replace(images=images)

    def branch(params):
        start = world.encode(params, observation, KEY)
        return start, world.step(params, start, actions(), KEY)

    start, after = jax.eval_shape(branch, jax.eval_shape(world.init, KEY))
    assert jax.tree.structure(start) == jax.tree.structure(after)
    assert all(a.shape == b.shape for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(after)))
