import jax
import numpy as np
import pytest

from mbpo_jax.types import Prompt

from .conftest import make_observation, make_policy, random_params

KEY = jax.random.key(0)


def spoil(observation, **changes):
    images = dict(observation.images)
    prompt = observation.prompt
    match changes:
        case {"missing": camera}:
            del images[camera]
        case {"size": size}:
            images = make_observation(size=size).images
        case {"shape": shape}:
            images["agentview"] = np.zeros(shape, np.uint8)
        case {"dtype": dtype}:
            images["agentview"] = images["agentview"].astype(dtype)
        case {"nan": "image"}:
            images["agentview"] = np.full((3, 16, 16, 3), 0.5, np.float32)
            images["agentview"][1, 2, 3, 0] = np.nan
        case {"prompt": length}:
            prompt = Prompt(np.ones((3, length), np.int32), np.ones((3, length), bool))
        case {"token": token}:
            prompt = Prompt(np.full((3, 6), token, np.int32), np.ones((3, 6), bool))
    return observation.replace(images=images, prompt=prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": "robot0_eye_in_hand"}, r"images\['robot0_eye_in_hand'\] is missing"),
        ({"size": 32}, r"images\['agentview'\] is 32 x 32 pixels, the policy expects 16 x 16"),
        ({"shape": (3, 16, 24, 3)}, r"images\['agentview'\] is 16 x 24 pixels"),
        ({"shape": (16, 16, 3)}, r"images\['agentview'\] has shape \(16, 16, 3\)"),
        ({"shape": (2, 16, 16, 3)}, "batch size 3"),
        ({"dtype": np.int32}, r"images\['agentview'\] is int32"),
        ({"nan": "image"}, r"images\['agentview'\] is not finite.*\(1, 2, 3, 0\)"),
        ({"prompt": 7}, "7 token slots, the policy's budget is 6"),
        ({"token": 40}, "token id 40, the vocabulary has 40"),
    ],
)
def test_bad_observation_names_the_field(change, message, observation):
    policy = make_policy()
    with pytest.raises(ValueError, match=message):
        policy.act(policy.init(KEY), spoil(observation, **change), KEY)


def test_nan_in_proprio_is_named(observation):
    bad = np.array(observation.proprio)
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"proprio is not finite.*\(2, 1\)"):
        make_policy(pi05=False, use_proprio=True).check(observation.replace(proprio=bad))
    make_policy().check(observation.replace(proprio=bad))  # π0.5 does not read it


def test_too_many_proprio_dimensions(observation):
    with pytest.raises(ValueError, match=r"proprioception has 4 dimensions.*action_dim=3"):
        make_policy(pi05=False, use_proprio=True, action_dim=3)


def test_wrong_action_shape_is_named(observation):
    policy = make_policy()
    actor = policy.init(KEY)["actor"]
    with pytest.raises(ValueError, match=r"expected \[B, 4, 3\]"):
        policy.loss(actor, observation, np.zeros((3, 4, 5), np.float32), KEY)


def test_prompt_is_cut_only_on_request(observation):
    long = spoil(observation, prompt=9)
    policy = make_policy(truncate_prompt=True)
    params = random_params(policy)
    cut = policy.encode(params, long)
    short = policy.encode(params, spoil(observation, prompt=6))
    np.testing.assert_array_equal(cut.features, short.features)


def test_square_frames_are_resized_on_request(observation):
    # Frames of one colour each, which a resize of any kind leaves alone.
    policy = make_policy(resize_images=True)
    params = random_params(policy)
    flat = {name: x[:, :1, :1] + np.zeros_like(x) for name, x in observation.images.items()}
    doubled = {name: x.repeat(2, 1).repeat(2, 2) for name, x in flat.items()}
    large = policy.encode(params, observation.replace(images=doubled))
    exact = policy.encode(params, observation.replace(images=flat))
    np.testing.assert_allclose(large.features, exact.features, atol=1e-5)
