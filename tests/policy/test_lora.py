import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.policy import lora
from mbpo_jax.policy.config import LoraConfig

from .conftest import ACTION_DIM, make_policy, random_params


def test_merge_by_hand():
    """W + (alpha / r)·a·b = 1 + (4 / 2)·(1·3 + 2·1) = 11."""
    actor = {
        "w": jnp.ones((1, 1)),
        "lora": {"w": {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [1.0]])}},
    }
    merged = lora.merge(actor, LoraConfig(rank=2, alpha=4.0))
    assert list(merged) == ["w"]
    np.testing.assert_allclose(merged["w"], [[11.0]])


def test_fresh_adapters_change_nothing_and_are_all_that_trains(observation):
    plain = make_policy()
    config = {"lora": LoraConfig(rank=2), "frozen": ("PaliGemma/",)}
    adapted = make_policy(**config)
    actor = random_params(plain)["actor"]
    with_lora = actor | {"lora": lora.init(jax.random.key(3), actor, adapted.config.lora)}
    actions = np.zeros((3, 4, ACTION_DIM), np.float32)

    def loss(policy, actor):
        return policy.loss(actor, observation, actions, jax.random.key(1))[0]

    np.testing.assert_allclose(loss(adapted, with_lora), loss(plain, actor), rtol=1e-6)
    gradients = jax.grad(lambda a: loss(adapted, a))(with_lora)
    assert not any(np.any(g) for g in jax.tree.leaves(gradients["PaliGemma"]))
    assert any(np.any(g) for g in jax.tree.leaves(gradients["lora"]))
    assert np.any(gradients["action_out_proj"]["kernel"])


def test_trainable_marks_frozen_paths():
    policy = make_policy(frozen=("PaliGemma/img", "action_in_proj/bias"))
    params = policy.init(jax.random.key(0))
    marks = policy.trainable(params)
    assert jax.tree.structure(marks) == jax.tree.structure(params)
    assert not any(jax.tree.leaves(marks["actor"]["PaliGemma"]["img"]))
    assert all(jax.tree.leaves(marks["actor"]["PaliGemma"]["llm"]))
    assert marks["actor"]["action_in_proj"] == {"kernel": True, "bias": False}
    assert all(jax.tree.leaves(marks["critic"]))


def test_pattern_without_weights_is_refused():
    with pytest.raises(ValueError, match="match no weight"):
        make_policy(lora=LoraConfig(rank=2, modules=("nothing",))).init(jax.random.key(0))
