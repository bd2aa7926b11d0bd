import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import websockets
from websockets.sync.client import connect

from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim.libero import task_info
from mbpo_jax.policy.config import FlowConfig
from mbpo_jax.serving.inference import load
from mbpo_jax.serving.protocol import pack, unpack
from mbpo_jax.serving.server import RateLimit, serving_in_thread
from mbpo_jax.stages.build import load_policy
from mbpo_jax.stages.simulation import batched_act, make_pool
from mbpo_jax.stages.workspace import StageError, read_config
from tests.serving.conftest import SIZES, message

openpi_client = pytest.importorskip(
    "openpi_client.websocket_client_policy",
    reason="openpi's client is not installed (pip install --no-deps openpi-client==0.1.2)",
)


def client(port: int, **options):
    return openpi_client.WebsocketClientPolicy("127.0.0.1", port, **options)


@pytest.fixture(scope="module")
def port(served):
    with serving_in_thread(served) as (port, _):
        yield port


def test_the_public_client_gets_metadata_and_the_policys_chunk(port, served):
    robot = client(port)
    assert robot.get_server_metadata() == served.metadata
    observation = message(seed=1, episode=5, chunk_index=2)
    answer = robot.infer(observation)
    expected = served.infer([served.request(observation, (5, 2))])[0]
    assert (answer["actions"].dtype, answer["actions"].shape) == (np.float32, (4, 7))
    np.testing.assert_array_equal(answer["actions"], expected)
    assert 0 < answer["policy_timing"]["infer_ms"] <= answer["server_timing"]["infer_ms"]
    assert "prev_total_ms" in robot.infer(observation)["server_timing"]


def test_a_connections_chunks_have_noise_of_their_own_unless_they_are_named(port):
    robot, observation = client(port), message()
    first, second = (robot.infer(observation)["actions"] for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    again = [robot.infer({**observation, "episode": 1, "chunk_index": 0}) for _ in range(2)]
    np.testing.assert_array_equal(again[0]["actions"], again[1]["actions"])


def test_cameras_go_by_their_own_names_too_and_other_sizes_are_padded(port):
    robot, openpi = client(port), message(episode=0, chunk_index=0)
    ours = dict(openpi)
    ours["observation/agentview"] = ours.pop("observation/image")
    ours["observation/robot0_eye_in_hand"] = ours.pop("observation/wrist_image")
    expected = robot.infer(openpi)["actions"]
    np.testing.assert_array_equal(robot.infer(ours)["actions"], expected)
    # A wide frame is shrunk to 16 x 8 and padded above and below.
    colour = np.full((16, 32, 3), 200, np.uint8)
    padded = np.zeros((16, 16, 3), np.uint8)
    padded[4:12] = 200
    wide = robot.infer({**openpi, "observation/image": colour})["actions"]
    np.testing.assert_array_equal(
        wide, robot.infer({**openpi, "observation/image": padded})["actions"]
    )


class Recorded:
    """A policy that remembers how large its batches were, and works when it is allowed to."""

    def __init__(self, served, open_gate=True):
        self._served, self.batches, self.gate = served, [], threading.Event()
        self.metadata, self.max_batch = served.metadata, served.max_batch
        self.request = served.request
        if open_gate:
            self.gate.set()

    def infer(self, requests):
        self.batches.append(len(requests))
        self.gate.wait(30)
        return self._served.infer(requests)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_clients_are_batched_and_get_what_they_would_get_alone(served):
    policy = Recorded(served, open_gate=False)
    observations = [message(seed=i, episode=i, chunk_index=0) for i in range(7)]
    with serving_in_thread(policy) as (port, _), ThreadPoolExecutor(7) as pool:
        robots = [client(port) for _ in observations]
        answers = [pool.submit(r.infer, o) for r, o in zip(robots, observations)]
        wait_until(lambda: policy.batches)
        time.sleep(0.3)  # the others are queued behind the first
        policy.gate.set()
        together = [answer.result(30)["actions"] for answer in answers]
    assert sum(policy.batches) == len(observations)
    assert max(policy.batches) == SIZES[-1]
    for observation, chunk in zip(observations, together):
        alone = served.infer([served.request(observation, (0, 0))])[0]
        np.testing.assert_allclose(chunk, alone, atol=1e-5)


BROKEN = {
    "no camera": ({"observation/image": None}, "is NoneType: send a uint8"),
    "floats": ({"observation/image": np.zeros((16, 16, 3), np.float32)}, "is float32"),
    "channels first": ({"observation/image": np.zeros((3, 16, 16), np.uint8)}, r"\(3, 16, 16\)"),
    "nothing": ({"observation/image": np.zeros((0, 16, 3), np.uint8)}, r"\(0, 16, 3\)"),
    "NaN": ({"observation/state": np.array([0] * 7 + [np.nan])}, "1 that are not finite"),
    "short state": ({"observation/state": np.zeros(3)}, r"shape \(3,\)"),
    "state of text": ({"observation/state": "left"}, "not an array of numbers"),
    "empty prompt": ({"prompt": " "}, "'prompt' must be a text"),
    "long prompt": ({"prompt": "xyz " * 20}, "shorten the instruction"),
    "episode": ({"episode": -1}, "'episode' must be a whole number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_observation_gets_an_error_and_the_connection_goes_on(port, name):
    change, complaint = BROKEN[name]
    robot = client(port)
    with pytest.raises(RuntimeError, match=complaint):
        robot.infer(message(**change))
    assert robot.infer(message())["actions"].shape == (4, 7)


def test_a_missing_camera_is_named(port):
    observation = message()
    del observation["observation/wrist_image"]
    with pytest.raises(RuntimeError, match=r"'robot0_eye_in_hand'.*observation/wrist_image"):
        client(port).infer(observation)


def test_garbage_and_oversized_messages_cost_nobody_else_their_connection(served):
    with serving_in_thread(served, max_message_bytes=10_000) as (port, _):
        other = client(port)
        with connect(f"ws://127.0.0.1:{port}") as rude:
            rude.recv()
            for data in (b"\xc1garbage", pack([1, 2]), "a text"):
                rude.send(data)
                assert rude.recv().startswith("error: ")
            rude.send(pack(message()))
            assert unpack(rude.recv())["actions"].shape == (4, 7)
            rude.send(b"\0" * 20_000)
            with pytest.raises(websockets.ConnectionClosedError, match="1009"):
                rude.recv()
        assert other.infer(message())["actions"].shape == (4, 7)


def test_a_failing_batch_ends_only_the_connections_that_wait_for_it(served):
    class Failing(Recorded):
        def infer(self, requests):
            if any(request.identity[0] == 13 for request in requests):
                raise FloatingPointError("out of luck")
            return super().infer(requests)

    with serving_in_thread(Failing(served)) as (port, _):
        unlucky, other = client(port), client(port)
        with pytest.raises(websockets.ConnectionClosedError, match="1011"):
            unlucky.infer(message(episode=13))
        assert other.infer(message())["actions"].shape == (4, 7)


def test_a_browser_is_refused(port):
    with pytest.raises(websockets.InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{port}", origin="http://elsewhere.test")


def test_the_api_key_is_required_where_there_is_one(served):
    with serving_in_thread(served, api_key="open sesame") as (port, _):
        assert client(port, api_key="open sesame").get_server_metadata() == served.metadata
        for wrong in (None, "sesame"):
            with pytest.raises(websockets.InvalidStatus, match="401"):
                client(port, api_key=wrong)
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").read() == b"OK\n"


def test_the_rate_is_limited_per_connection(served):
    with serving_in_thread(served, requests_per_second=2) as (port, _):
        hasty, other = client(port), client(port)
        for _ in range(2):
            hasty.infer(message())
        with pytest.raises(RuntimeError, match="more than 2 requests per second"):
            hasty.infer(message())
        other.infer(message())
        time.sleep(0.6)
        hasty.infer(message())


def test_the_token_bucket():
    limit = RateLimit(2.0, now=0.0)
    assert [limit.admits(t) for t in (0.0, 0.0, 0.0)] == [True, True, False]
    assert [limit.admits(t) for t in (0.4, 0.5, 0.6)] == [False, True, False]
    assert [limit.admits(100.0) for _ in range(3)] == [True, True, False]


def test_draining_answers_what_is_in_work_and_takes_nothing_new(served):
    policy = Recorded(served, open_gate=False)
    with serving_in_thread(policy) as (port, stop), ThreadPoolExecutor(1) as pool:
        busy, idle = client(port), client(port)
        answer = pool.submit(busy.infer, message())
        wait_until(lambda: policy.batches)
        stop()
        wait_until(lambda: refused(port))
        with pytest.raises(RuntimeError, match="shutting down"):
            idle.infer(message())
        assert not answer.done()
        policy.gate.set()
        assert answer.result(30)["actions"].shape == (4, 7)
        with pytest.raises(websockets.ConnectionClosedOK, match="1001"):
            busy.infer(message())


def refused(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1)
    except (urllib.error.URLError, ConnectionError):
        return True
    return False


def test_the_command_serves_and_ends_well_on_sigterm(checkpoint):
    command = [sys.executable, "-m", "experiments.serve_policy", f"--checkpoint={checkpoint}"]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(
        [*command, "--port=0", "--batch_sizes=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        address = process.stdout.readline()
        assert address.startswith("serving on ws://127.0.0.1:"), process.stderr.read()
        robot = client(int(address.rpartition(":")[2]))
        assert robot.infer(message())["actions"].shape == (4, 7)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "all requests are answered" in process.stdout.read()
        with pytest.raises(websockets.ConnectionClosedOK, match="1001"):
            robot.infer(message())


def test_a_folder_without_a_policy_is_refused(checkpoint):
    with pytest.raises(StageError, match="holds no policy"):
        load(checkpoint.parent, SIZES)


def test_choosing_needs_a_value_and_something_to_choose_among(checkpoint):
    with pytest.raises(ValueError, match="best_of is 0"):
        load(checkpoint, SIZES, best_of=0)
    with pytest.raises(StageError, match="'value' has not finished"):
        load(checkpoint, SIZES, best_of=2)


def test_only_policy_optimisation_has_a_best_state(checkpoint):
    with pytest.raises(FileNotFoundError, match="imagined_success"):
        load(checkpoint, SIZES, best=True)


@pytest.mark.libero
def test_episodes_over_the_server_equal_those_in_process(checkpoint, served):
    pytest.importorskip("libero", reason="the simulator is not installed (extra: libero)")
    config = read_config(checkpoint.parent)
    with config.unlocked():
        config.update({"suite": "libero_object", "tasks": (0,)})
        config.update({"workers": 1, "worker_backend": "local"})
        config.rl = {"flow": dataclasses.asdict(FlowConfig())}
        config.world_model = {"max_prompt_tokens": 16}
        config.pretrained.world_tokenizer = ""
    policy, params = load_policy(config, checkpoint, checkpoint / "policy")
    instruction = task_info(config.suite, 0).instruction
    requests = [EpisodeRequest(task_id=0, seed=7, max_steps=6, render_every=4)]

    with make_pool(config) as pool, serving_in_thread(served) as (port, _):
        robot = client(port)

        def over_the_server(queries):
            return np.stack([robot.infer(_message(q, instruction))["actions"] for q in queries])

        (here,) = pool.policy_episodes(requests, batched_act(config, policy.act, params))
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
