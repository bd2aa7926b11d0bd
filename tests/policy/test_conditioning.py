import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbpo_jax.policy import inputs

from .conftest import ACTION_DIM, make_observation, make_policy


@pytest.mark.trains
def test_advantage_conditioning_recovers_the_better_arm():
    """Half of the data plays −0.6 and is labelled bad, half plays +0.6 and is labelled good."""
    policy = make_policy(
        advantage_conditioned=True, guidance=1.5, eval_steps=5, normalization="zscore"
    )
    # The same observation every time, so that only the token tells good from bad.
    observation = jax.tree.map(lambda x: np.repeat(x, 32, axis=0), make_observation(batch=1))
    good = jnp.arange(32) % 2 == 0
    actions = jnp.where(good, 0.6, -0.6)[:, None, None] * jnp.ones((32, 4, ACTION_DIM))
    actor = policy.init(jax.random.key(0))["actor"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(actor):
        def step(carry, key):
            actor, state = carry
            gradient = jax.grad(
                lambda a: policy.loss(a, observation, actions, key, quality=good)[0]
            )(actor)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(actor, updates), state), None

        keys = jax.random.split(jax.random.key(1), 400)
        return jax.lax.scan(step, (actor, optimizer.init(actor)), keys)[0][0]

    trained = {"actor": train(actor)}
    played = jax.jit(policy.act)(trained, observation, jax.random.key(2))
    assert np.mean(np.asarray(played).mean((1, 2)) > 0.2) > 0.9


def test_the_token_is_part_of_the_prefix_only_when_asked(observation):
    plain, conditioned = make_policy(), make_policy(advantage_conditioned=True)
    params = plain.init(jax.random.key(0))
    images, prompt = 2 * 4, 6
    assert plain.encode(params, observation).cache.mask.shape == (3, images + prompt)
    assert conditioned.encode(params, observation).cache.mask.shape == (3, images + prompt + 1)


def test_quality_is_rounded_to_one_of_the_last_tokens(observation):
    prompt = inputs.prompt(observation, make_policy().config)
    quality, shown = jnp.array([0.0, 0.3, 1.0]), jnp.array([True, True, False])
    for levels, expected in ((2, [-2, -2, -1]), (3, [-3, -2, -1]), (11, [-11, -8, -1])):
        config = make_policy(quality_levels=levels).config
        longer = inputs.with_quality(prompt, config, quality, shown)
        assert (longer.tokens[:, -1] - config.vocab_size).tolist() == expected
        assert longer.mask[:, -1].tolist() == [True, True, False]
    with pytest.raises(ValueError, match="quality_levels is 1"):
        make_policy(quality_levels=1)
