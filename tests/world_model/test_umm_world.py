"""Interleaved view decoding, reward, losses, and what happens on bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbpo_jax.types import RewardExample, Transition
from mbpo_jax.world_model import metrics
from mbpo_jax.world_model.config import GuidanceConfig, UMMConfig, variant
from mbpo_jax.world_model.umm_world import to_uint8

from .conftest import CAMERAS, SIZE, awaken, make_observation, make_transition, make_world

KEY = jax.random.key(3)


def views(world, params, observation, actions):
    return jax.jit(world.step)(params, observation, actions, KEY).images


def actions(seed=0, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 3, 2)).astype(np.float32)


def stage_loss(world, params, transition, camera):
    loss = jax.jit(world.dynamics_loss)
    return float(loss(params, transition, KEY)[1][f"dynamics/{camera}"])


def test_a_fresh_model_copies_the_frame(world):
    observation = make_observation()
    fresh = world.init(jax.random.key(0))
    following = jax.jit(world.step)(fresh, observation, actions(), KEY)
    for camera in CAMERAS:
        np.testing.assert_array_equal(following.images[camera], observation.images[camera])
    np.testing.assert_array_equal(following.proprio, observation.proprio)
    np.testing.assert_array_equal(following.world_prompt.tokens, observation.world_prompt.tokens)


def test_later_views_are_conditioned_on_earlier_ones_and_not_on_actions(world, params):
    transition = make_transition()
    wrist = stage_loss(world, params, transition, "wrist")

    other_actions = transition.replace(actions=actions(9))
    assert stage_loss(world, params, other_actions, "wrist") == wrist
    head = stage_loss(world, params, transition, "head")
    assert stage_loss(world, params, other_actions, "head") != head

    other_head = make_observation(7).images["head"]
    images = {**transition.next_images, "head": other_head}
    assert stage_loss(world, params, transition.replace(next_images=images), "wrist") != wrist

    # Given the next head view, the current one says nothing more about the wrist.
    observation = transition.observation
    images = {**observation.images, "head": other_head}
    moved = transition.replace(observation=observation.replace(images=images))
    assert stage_loss(world, params, moved, "wrist") == wrist
    assert stage_loss(world, params, moved, "head") != head


def test_head_view_is_conditioned_on_every_current_view(world, params):
    transition = make_transition()
    observation = transition.observation
    images = {**observation.images, "wrist": make_observation(7).images["wrist"]}
    moved = transition.replace(observation=observation.replace(images=images))
    head = stage_loss(world, params, transition, "head")
    assert stage_loss(world, params, moved, "head") != head


def test_imagined_wrist_follows_the_imagined_head(world, params):
    # Actions reach the wrist only through the head view that they change.
    observation = make_observation()
    first, second = (views(world, params, observation, actions(s)) for s in (0, 1))
    assert np.any(first["head"] != second["head"])
    assert np.any(first["wrist"] != second["wrist"])
    frozen_head = jax.tree.map(lambda x: x, params)
    frozen_head["statistics"]["residual_scale"]["head"] = jnp.zeros(())
    first, second = (views(world, frozen_head, observation, actions(s)) for s in (0, 1))
    np.testing.assert_array_equal(first["head"], observation.images["head"])
    np.testing.assert_array_equal(first["wrist"], second["wrist"])


def test_padding_of_the_prompt_changes_nothing(world, params):
    observation = make_observation()
    prompt = observation.world_prompt
    tokens = np.where(prompt.mask, prompt.tokens, 33)
    changed = observation.replace(world_prompt=prompt.replace(tokens=tokens))
    for other in (world.reward, lambda p, o: world.step(p, o, actions(), KEY).images["wrist"]):
        found = jax.jit(other)
        np.testing.assert_array_equal(found(params, observation), found(params, changed))


def test_batch_axes_are_kept(world, params):
    flat = make_observation(batch=(4,))
    shaped = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), flat)
    reward = jax.jit(world.reward)
    assert reward(params, shaped).shape == (2, 2)
    np.testing.assert_allclose(reward(params, shaped).reshape(4), reward(params, flat), atol=1e-6)
    following = jax.jit(world.step)(params, shaped, actions(batch=4).reshape(2, 2, 3, 2), KEY)
    assert following.images["head"].shape == (2, 2, SIZE, SIZE, 3)
    assert following.images["head"].dtype == jnp.uint8


def test_reward_is_the_answer_after_the_question(world, params):
    observation = make_observation()
    probability = jax.jit(world.reward)(params, observation)
    logits = world._answer_logits(params, observation)
    yes, no = logits[:, world.yes_id], logits[:, world.no_id]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(no - yes)), atol=1e-5)
    unseen = observation.replace(
        images={**observation.images, "wrist": make_observation(5).images["wrist"]}
    )
    np.testing.assert_array_equal(jax.jit(world.reward)(params, unseen), probability)


def test_text_actions_velocity_and_guidance(world):
    config = dict(prediction="velocity", actions_as="text", num_timesteps=4)
    unguided = make_world(**config)
    params = awaken(unguided.init(jax.random.key(0)))
    observation = make_observation()
    plain = views(unguided, params, observation, actions())
    other = views(unguided, params, observation, actions(1))
    assert np.any(plain["head"] != other["head"])
    guided = make_world(**config, guidance=GuidanceConfig(3.0, 2.0))
    found = views(guided, params, observation, actions())
    assert np.any(plain["head"] != found["head"])
    # Guidance that never acts changes nothing.
    outside = make_world(**config, guidance=GuidanceConfig(3.0, 2.0, interval=(2.0, 3.0)))
    found = views(outside, params, observation, actions())
    np.testing.assert_array_equal(plain["head"], found["head"])


def test_statistics_whiten_latents_and_residuals(world, params):
    transition = make_transition(batch=(16,))
    images, following = transition.observation.images, transition.next_images
    params = world.set_latent_statistics(params, images, following)
    now = {c: world.encode_images(params, images[c]) for c in CAMERAS}
    later = {c: world.encode_images(params, following[c]) for c in CAMERAS}
    pooled = np.concatenate([now[c] for c in CAMERAS])
    np.testing.assert_allclose(pooled.mean((0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(pooled.std((0, 1, 2)), 1.0, atol=1e-3)
    for camera in CAMERAS:
        residual = np.asarray(later[camera] - now[camera])
        scale = params["statistics"]["residual_scale"][camera]
        np.testing.assert_allclose(np.sqrt(np.mean(residual**2)), scale, rtol=1e-3)


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
    return Transition(observation, chunk, draw(start + step))


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


def test_it_learns_a_moving_square():
    world = make_world(num_timesteps=2)
    rng = np.random.default_rng(0)
    params = world.init(jax.random.key(0))
    data = moving_squares(rng, 512)
    frames = np.concatenate([*data.observation.images.values()])
    picks = (frames[rng.integers(len(frames), size=64)] for _ in range(250))
    params["vae"] = train(lambda p, x, k: world.vae_loss(p, x, k)[0], params["vae"], picks, 3e-3)
    params = world.set_latent_statistics(params, data.observation.images, data.next_images)

    frozen = {k: params[k] for k in world.frozen}
    trained = {k: v for k, v in params.items() if k not in world.frozen}
    rows = (rng.integers(512, size=64) for _ in range(300))
    picks = (jax.tree.map(lambda x, i=i: x[i], data) for i in rows)
    trained = train(
        lambda p, b, k: world.dynamics_loss({**p, **frozen}, b, k)[0], trained, picks, 2e-3
    )
    report = metrics.fidelity(world, {**trained, **frozen}, moving_squares(rng, 128), KEY)
    for camera in CAMERAS:
        assert report[camera]["psnr"] > report[camera]["copy_psnr"] + 1.0, report


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
    probability = jax.jit(world.reward)(params, example.observation)
    assert metrics.classification(probability, label)["f1"] > 0.95


def test_bytes_are_rounded_and_clipped():
    # (x + 1) * 127.5: -0.996 -> 0.51, 0.0 -> 127.5 (even: 128), beyond 1 is clipped.
    found = to_uint8(jnp.array([-2.0, -0.996, 0.0, 1.0, 3.0]))
    np.testing.assert_array_equal(found, [0, 1, 128, 255, 255])


def test_bad_input(world, params):
    observation = make_observation()
    only_head = observation.replace(images={"head": observation.images["head"]})
    with pytest.raises(ValueError, match=r"lacks \['wrist'\]"):
        world.step(params, only_head, actions(), KEY)
    third = observation.replace(images={**observation.images, "side": only_head.images["head"]})
    with pytest.raises(ValueError, match=r"unknown \['side'\]"):
        world.reward(params, third)
    small = {c: x[:, :8] for c, x in observation.images.items()}
    with pytest.raises(ValueError, match=r"'head' is \(8, 16, 3\), expected \(16, 16, 3\)"):
        world.reward(params, observation.replace(images=small))
    with pytest.raises(ValueError, match=r"chunk is \(2, 2\), expected \(3, 2\)"):
        world.step(params, observation, actions()[:, :2], KEY)
    transition = make_transition().replace(next_images=small)
    with pytest.raises(ValueError, match="expected"):
        world.dynamics_loss(params, transition, KEY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "noise"}, "prediction is 'noise'"),
        ({"actions_as": "image"}, "actions_as is 'image'"),
        ({"vae_image_size": 20}, "multiple of 8"),
        ({"vae_image_size": 24}, "at most 16"),
        ({"vit_image_size": 12}, "ViT's patch size"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        make_world(**changes)


def test_variants():
    assert isinstance(variant("bagel"), UMMConfig)
    with pytest.raises(ValueError, match="micro, small, bagel"):
        variant("mikro")


def test_three_views_are_decoded_in_order():
    cameras = ("head", "left", "right")
    world = make_world(cameras=cameras)
    params = awaken(world.init(jax.random.key(0)))
    transition = make_transition(cameras=cameras)
    parts = jax.jit(world.dynamics_loss)(params, transition, KEY)[1]
    changed = {**transition.next_images, "right": make_observation(8).images["wrist"]}
    other = jax.jit(world.dynamics_loss)(params, transition.replace(next_images=changed), KEY)[1]
    assert other["dynamics/left"] == parts["dynamics/left"]
    changed = {**transition.next_images, "left": make_observation(8).images["wrist"]}
    other = jax.jit(world.dynamics_loss)(params, transition.replace(next_images=changed), KEY)[1]
    assert other["dynamics/head"] == parts["dynamics/head"]
    assert other["dynamics/right"] != parts["dynamics/right"]


def test_targets_per_example_do_not_see_each_other(world, params):
    # With two targets per context the loss is the mean of two that are computed alone.
    two = make_world(targets_per_example=2)
    transition = make_transition()
    config = dataclasses.replace(two.config, targets_per_example=1)
    keys = jax.random.split(KEY, 2 + len(CAMERAS))
    time_key, noise_key = jax.random.split(keys[2])
    draws = jax.random.normal(time_key, (2, 2))
    together = float(jax.jit(two.dynamics_loss)(params, transition, KEY)[1]["dynamics/head"])
    alone = []
    frames = two._encode(params, transition.observation.images, CAMERAS, keys[0])
    following = two._encode(params, transition.next_images, CAMERAS[:-1], keys[1])
    context = [
        two._prompt(params, transition.observation),
        *two._conditions(params, "head", frames, {}, two._action(params, transition.actions)),
    ]
    scale = params["statistics"]["residual_scale"]["head"]
    clean = (following["head"].tokens - frames["head"].tokens) / scale
    noise = jax.random.normal(noise_key, (2, *clean.shape))
    for i in range(2):
        t = jax.nn.sigmoid(draws[i])
        noised = (1 - t)[:, None, None] * clean + t[:, None, None] * noise[i]
        segment = two._latent_segment(params, noised, t, frames["head"].tokens)
        alone.append(_single_loss(params, config, [*context, segment], clean))
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-4)


def _single_loss(params, config, segments, clean):
    from mbpo_jax.world_model import bagel

    _, hidden = bagel.forward(params, config, segments)
    output = bagel.read_latents(params, hidden[:, -clean.shape[1] :])
    return float(jnp.mean(jnp.square(output - clean)))
