import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.policy.augment import augment

from .conftest import ACTION_DIM, make_policy


def test_wrist_views_keep_their_geometry():
    """An image that is dark on the left half and light on the right half keeps its edge in place
    unless it is moved: the colour jitter maps equal pixels to equal pixels."""
    image = jnp.where(jnp.arange(32) < 16, -0.5, 0.5)[None, :, None] * jnp.ones((32, 1, 3))
    images = jnp.broadcast_to(image, (16, 2, 32, 32, 3))
    out = np.asarray(jax.jit(augment, static_argnums=2)(images, jax.random.key(0), (True, False)))
    edge = np.abs(np.diff(out[..., 0], axis=-1)).argmax(-1)  # [16, 2, 32]
    assert (edge[:, 1] == 15).all()
    assert len(np.unique(edge[:, 0])) > 1
    assert np.abs(out).max() <= 1
    assert len(np.unique(out[:, 1, 0, 0, 0])) == 16  # every example has its own colours


def test_a_grey_image_only_changes_brightness():
    images = jnp.zeros((64, 1, 8, 8, 3))
    out = np.asarray(augment(images, jax.random.key(1), (False,)))
    level = out[:, 0, 0, 0, 0]
    np.testing.assert_allclose(
        out, np.broadcast_to(level[:, None, None, None, None], out.shape), atol=1e-5
    )
    # 0 in [-1, 1] is 0.5 in [0, 1]; brightness factors 0.7 … 1.3 give 0.35 … 0.65.
    assert -0.3 - 1e-5 <= level.min() < -0.2
    assert 0.2 < level.max() <= 0.3 + 1e-5


def test_loss_augments_only_on_request(observation):
    actions = np.zeros((3, 4, ACTION_DIM), np.float32)
    losses = []
    for augmented in (False, True):
        policy = make_policy(augment=augmented)
        actor = jax.tree.map(lambda x: x + 0.05, policy.init(jax.random.key(0))["actor"])
        loss, _ = jax.jit(policy.loss)(actor, observation, actions, jax.random.key(1))
        losses.append(float(loss))
    assert losses[0] != losses[1]
