"""The real simulator driven over the server, beside the same policy in process."""

import dataclasses

import numpy as np
import pytest

from mbpo_jax.envs.libero import task_info
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.policy.config import FlowConfig
from mbpo_jax.serving.server import serving_in_thread
from mbpo_jax.stages.build import load_policy
from mbpo_jax.stages.collect import batched_act, make_pool
from mbpo_jax.stages.workspace import read_config


@pytest.mark.libero
def test_episodes_over_the_server_equal_those_in_process(checkpoint, served):
    pytest.importorskip("libero", reason="the simulator is not installed (extra: libero)")
    openpi_client = pytest.importorskip(
        "openpi_client.websocket_client_policy",
        reason="openpi's client is not installed (pip install --no-deps openpi-client==0.1.2)",
    )
    config = read_config(checkpoint.parent)
    with config.unlocked():
        config.update({"suite": "libero_object", "tasks": (0,), "workers": 1})
        config.rl = {"flow": dataclasses.asdict(FlowConfig())}
        config.world_model = {"max_prompt_tokens": 16}
        config.pretrained.world_tokenizer = ""
    policy, params = load_policy(config, checkpoint, checkpoint / "policy")
    instruction = task_info(config.suite, 0).instruction
    requests = [EpisodeRequest(task_id=0, seed=7, max_steps=6)]

    with make_pool(config) as pool, serving_in_thread(served) as (port, _):
        robot = openpi_client.WebsocketClientPolicy("127.0.0.1", port)

        def over_the_server(queries):
            return np.stack([robot.infer(_message(q, instruction))["actions"] for q in queries])

        (here,) = pool.policy_episodes(requests, batched_act(config, policy, params))
        (there,) = pool.policy_episodes(requests, over_the_server)
    assert here.episode.success == there.episode.success
    np.testing.assert_array_equal(here.episode.actions, there.episode.actions)
    np.testing.assert_array_equal(here.episode.proprio, there.episode.proprio)
    assert len(here.episode.timesteps) == 3  # two chunks and the end


def _message(query, instruction):
    head, wrist = query.images.values()
    return {
        "observation/image": head,
        "observation/wrist_image": wrist,
        "observation/state": query.proprio,
        "prompt": instruction,
        "episode": query.request.seed,
        "chunk_index": query.chunk_index,
    }
