"""The Mixture-of-Transformers decoder: masks, positions, experts, cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.nn import qwen2_mot
from mbpo_jax.nn.layers import rotate
from mbpo_jax.nn.qwen2_mot import MoTConfig, Segment

CONFIG = MoTConfig(20, 16, 2, 4, 2, 24)


def segment(attention, und, gen=0, valid=None, batch=1, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return Segment(
        jax.random.normal(keys[0], (batch, und, 16)),
        jax.random.normal(keys[1], (batch, gen, 16)),
        valid,
        attention,
    )


def image(seed, attention="full", gen=3, batch=1):
    return segment(attention, 2, gen, batch=batch, seed=seed)


@pytest.fixture(scope="module")
def params():
    return qwen2_mot.init(CONFIG, jax.random.key(1))


def run(params, segments, config=CONFIG):
    cache = qwen2_mot.empty_cache(config, segments[0].und.shape[0])
    return jax.jit(lambda p: qwen2_mot.forward(p, config, segments, cache))(params)


def test_mask_of_text_image_and_noise():
    # Und tokens: text a b, markers c d of an image, markers e f of a noised image; then the gen
    # tokens x of the image and y of the noised one.
    segments = [segment("causal", 2), image(0, gen=1), image(0, "noise", gen=1)]
    expected = np.array(
        [
            # a  b  c  d  e  f  x  y
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 1, 0],
            [1, 1, 1, 1, 0, 0, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 0, 0, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1],
        ],
        bool,
    )
    np.testing.assert_array_equal(qwen2_mot.attention_mask(segments), expected)


def test_two_noised_images_do_not_see_each_other():
    mask = qwen2_mot.attention_mask([image(0, "noise", gen=1), image(0, "noise", gen=1)])
    assert not mask[0, 2]
    assert not mask[2, 0]


def test_positions_skip_padding_and_give_an_image_one():
    valid = jnp.array([[True, True, False, True]])
    segments = [segment("causal", 4, valid=valid), image(0), image(0, "noise"), image(0, "noise")]
    positions, following = qwen2_mot.segment_positions(segments, jnp.array([5]))
    # Text 5 6 (6) 7, the image 8, both noised images 9, which they leave free.
    np.testing.assert_array_equal(
        positions[0], [5, 6, 6, 7, 8, 8, 9, 9, 9, 9, 8, 8, 8, 9, 9, 9, 9, 9, 9]
    )
    assert following == 9


def test_rotation_by_hand():
    # head_dim 2: one frequency, 1. (1, 0) turned by position 2 is (cos 2, sin 2).
    cos, sin = qwen2_mot.rope_angles(jnp.array([[2]]), 2, 1e4, 3)
    turned = rotate(jnp.array([[[[1.0, 0.0]]]]), cos[..., None, :], sin[..., None, :])
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(2.0), np.sin(2.0)], atol=1e-6)


def test_padding_changes_nothing(params):
    short = [segment("causal", 3), image(1)]
    padding = jnp.full((1, 2, 16), 7.0)
    und = jnp.concatenate([short[0].und[:, :2], padding, short[0].und[:, 2:]], axis=1)
    valid = jnp.array([[True, True, False, False, True]])
    long = [Segment(und, short[0].gen, valid, "causal"), short[1]]
    und_short, gen_short = run(params, short)
    und_long, gen_long = run(params, long)
    np.testing.assert_allclose(gen_short, gen_long, atol=1e-5)
    np.testing.assert_allclose(und_short, und_long[:, jnp.array([0, 1, 4, 5, 6])], atol=1e-5)


def test_cached_prefix_equals_one_pass(params):
    segments = [segment("causal", 3), image(1), image(2), image(3, "noise")]
    und, gen = run(params, segments)

    @jax.jit
    def cached(p):
        cache = qwen2_mot.empty_cache(CONFIG, 1)
        for s in segments[:-1]:
            cache, _, _ = qwen2_mot.extend(p, CONFIG, [s], cache)
        return qwen2_mot.forward(p, CONFIG, segments[-1:], cache)

    und_cached, gen_cached = cached(params)
    np.testing.assert_allclose(gen[:, -3:], gen_cached, atol=1e-5)
    np.testing.assert_allclose(und[:, -2:], und_cached, atol=1e-5)


def test_groups_of_rows_attend_to_their_own_caches(params):
    prefixes = [[], [segment("causal", 3)], [segment("causal", 2, seed=5), image(1)]]
    noised = [image(seed, "noise") for seed in (3, 4, 5)]

    @jax.jit
    def both(p):
        empty = qwen2_mot.empty_cache(CONFIG, 1)
        caches = [qwen2_mot.extend(p, CONFIG, s, empty)[0] if s else empty for s in prefixes]
        together = jax.tree.map(lambda *x: jnp.concatenate(x), *noised)
        alone = [qwen2_mot.forward(p, CONFIG, [s], c) for s, c in zip(noised, caches)]
        return qwen2_mot.forward(p, CONFIG, [together], *caches), alone

    found, alone = both(params)
    expected = jax.tree.map(lambda *x: jnp.concatenate(x), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_each_expert_has_its_own_weights(params):
    segments = [segment("causal", 3), image(1)]
    und, gen = run(params, segments)
    other = jax.tree.map(lambda x: x, params)
    mlp = other["layers"]["gen"]["mlp"]["down_proj"]
    # The last layer's gen MLP reaches gen tokens only.
    mlp["kernel"] = mlp["kernel"].at[-1].multiply(2.0)
    und_other, gen_other = run(other, segments)
    np.testing.assert_array_equal(und, und_other)
    assert jnp.abs(gen - gen_other).max() > 1e-3


def test_remat_gives_the_same_gradient(params):
    segments = [segment("causal", 2), image(1)]

    def loss(p, config):
        cache = qwen2_mot.empty_cache(config, 1)
        return jnp.sum(jnp.square(qwen2_mot.forward(p, config, segments, cache)[1]))

    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, CONFIG)
    remat = dataclasses.replace(CONFIG, remat=True)
    rematerialised = jax.jit(jax.grad(loss), static_argnums=1)(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, rematerialised)


def test_noise_never_enters_the_cache(params):
    with pytest.raises(ValueError, match="never enters the cache"):
        qwen2_mot.extend(params, CONFIG, [image(0, "noise")], qwen2_mot.empty_cache(CONFIG, 1))
