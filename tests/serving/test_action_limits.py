"""Every shipped robot gets its whole range of actions, from the policy and from the server."""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from websockets.sync.client import connect

import configs
from mbpo_jax.data.pipelines import collate
from mbpo_jax.embodiment import Embodiment
from mbpo_jax.nn.normalization import NormStats
from mbpo_jax.serving.inference import ServedPolicy
from mbpo_jax.serving.protocol import pack, unpack
from mbpo_jax.serving.server import serving_in_thread
from mbpo_jax.stages.build import build_policy
from tests.policy.conftest import TINY

SIZE = TINY.vision.image_size
ROBOTS = {
    found.name: found
    for module in pkgutil.iter_modules(configs.__path__)
    for found in vars(importlib.import_module(f"configs.{module.name}")).values()
    if isinstance(found, Embodiment)
}


def make_config(robot):
    width = max(robot.action_dim, robot.state_dim)
    network = dataclasses.replace(
        TINY, vocab_size=512, max_prompt_tokens=16, action_dim=width, chunk=robot.chunk
    )
    section = dataclasses.asdict(network)
    flow = section.pop("flow")
    return ml_collections.ConfigDict(
        {
            "robot": dataclasses.asdict(robot),
            "cameras": robot.cameras,
            "image_size": SIZE,
            "chunk": robot.chunk,
            "seed": 0,
            "pretrained": {"policy_tokenizer": ""},
            "policy": section,
            "rl": {"flow": flow},
        }
    )


def make_policy(config, robot):
    """Its statistics are those of actions all over the robot's range."""
    low, high = np.array(robot.action_limits).T
    actions = NormStats((low + high) / 2, (high - low) / 4, low, high)
    zero, one = np.zeros(robot.state_dim), np.ones(robot.state_dim)
    return build_policy(config, {"actions": actions, "state": NormStats(zero, one, -one, one)})


def towards(policy, sign):
    """Parameters with which every normalised action is about 100 * sign."""
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(policy.init, jax.random.key(0)))
    bias = zero["actor"]["action_out_proj"]["bias"]
    zero["actor"]["action_out_proj"]["bias"] = jnp.full_like(bias, -100.0 * sign)
    return zero


def message(robot):
    images = {f"observation/{c}": np.zeros((SIZE, SIZE, 3), np.uint8) for c in robot.cameras}
    return {**images, "observation/state": np.zeros(robot.state_dim), "prompt": "fold the towel"}


@pytest.mark.parametrize("name", ROBOTS)
def test_a_policy_reaches_each_limit_of_its_robot(name):
    robot = ROBOTS[name]
    config = make_config(robot)
    policy = make_policy(config, robot)
    served = ServedPolicy(config, policy, towards(policy, 1), (1,))
    observation = collate([served.request(message(robot), (0, 0)).observation])

    @jax.jit
    def chunks(params, key):
        prefix = policy.encode(params, observation)
        other = policy.with_flow(dataclasses.replace(policy.config.flow, method="noise"))
        return {
            "act": policy.act(params, observation, key),
            "sample": policy.sample(params, prefix, key).actions,
            "another flow": other.sample(params, prefix, key).actions,
        }

    limits = np.array(robot.action_limits, np.float32)
    for sign, limit in ((-1, limits[:, 0]), (1, limits[:, 1])):
        expected = np.broadcast_to(limit, (1, robot.chunk, robot.action_dim))
        for way, actions in chunks(towards(policy, sign), jax.random.key(0)).items():
            np.testing.assert_array_equal(actions, expected, err_msg=f"{way}, sign {sign}")
    with serving_in_thread(served) as (port, _), connect(f"ws://127.0.0.1:{port}") as client:
        client.recv()
        client.send(pack(message(robot)))
        np.testing.assert_array_equal(unpack(client.recv())["actions"], expected[0])


def test_every_robots_config_is_among_them():
    assert {"libero_panda", "two_pandas", "arx_x5", "galaxea_r1"} <= set(ROBOTS)


def test_limits_that_do_not_fit_the_actions_are_refused():
    robot = ROBOTS["arx_x5"]
    config = make_config(robot)
    of_seven = NormStats(*np.zeros((4, 7)))
    with pytest.raises(ValueError, match="7 dimensions"):
        build_policy(config, {"actions": of_seven, "state": of_seven})
