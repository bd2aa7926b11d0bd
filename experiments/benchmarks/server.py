"""Latency of the policy server under several clients at once, each waiting for its answer."""

import dataclasses
import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax
import ml_collections
import numpy as np
from tqdm import tqdm
from websockets.sync.client import connect

from experiments.benchmarks.policy import neutral_stats, sizes
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.serving.inference import ServedPolicy
from mbpo_jax.serving.protocol import pack, unpack
from mbpo_jax.serving.server import serving_in_thread

CAMERAS = ("head", "wrist")
STATE_DIM, ACTION_DIM = 8, 7  # one arm with a gripper


def run(size: str, clients: Sequence[int], requests: int) -> list[dict]:
    """A row per number of clients: quantiles of the seconds from a request to its answer over at
    least `requests` requests ("p50", "p95", "p99"), and "per_second", the chunks of all clients.

    The clients run in a process of their own and send frames of the policy's size back to back.
    """
    rows = []
    policy = _fresh_policy(size, max(clients))
    context = multiprocessing.get_context("spawn")
    with (
        serving_in_thread(policy, requests_per_second=float("inf")) as (port, _),
        ProcessPoolExecutor(1, context) as pool,
    ):
        for number in tqdm(clients, desc=f"{size}, clients"):
            each = -(-requests // number)
            seconds, wall = pool.submit(load, port, number, each).result()
            p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99]).tolist()
            row = {"size": size, "clients": number, "requests": seconds.size}
            rows.append(
                row | {"p50": p50, "p95": p95, "p99": p99, "per_second": seconds.size / wall}
            )
    return rows


def _fresh_policy(size: str, max_batch: int) -> ServedPolicy:
    network = sizes()[size]
    network = dataclasses.replace(network, vocab_size=max(512, network.vocab_size))
    stats = neutral_stats(ACTION_DIM), neutral_stats(STATE_DIM)
    policy = FlowPolicy(network, *stats, CAMERAS, [(-1.0, 1.0)] * ACTION_DIM)
    config = ml_collections.ConfigDict(
        {
            "cameras": CAMERAS,
            "image_size": network.vision.image_size,
            "chunk": network.chunk,
            "seed": 0,
            "pretrained": {"policy_tokenizer": ""},
            "policy": {"max_prompt_tokens": network.max_prompt_tokens},
        }
    )
    params = jax.jit(policy.init)(jax.random.key(0))
    return ServedPolicy(config, policy, params, sorted({1, 4, max_batch}))


def load(port: int, clients: int, requests: int) -> tuple[np.ndarray, float]:
    """Seconds [clients, requests] of every answer, and of everything from first to last.

    Raises:
        RuntimeError: the server answered with an error.
    """
    ready = threading.Barrier(clients)

    def converse(number: int) -> tuple[list[float], float, float]:
        rng = np.random.default_rng(number)
        seconds = []
        with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
            size = unpack(connection.recv())["image_size"]
            images = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
            message = {"observation/image": images[0], "observation/wrist_image": images[1]}
            message |= {"observation/state": np.zeros(STATE_DIM, np.float32), "prompt": "pick up"}
            for i in range(requests + 1):
                if i == 1:  # the first is not counted: it finds everything cold
                    ready.wait()
                    first = time.perf_counter()
                started = time.perf_counter()
                connection.send(pack(message))
                answer = connection.recv()
                if isinstance(answer, str):
                    ready.abort()
                    raise RuntimeError(f"the server answered {answer!r}")
                unpack(answer)
                seconds.append(time.perf_counter() - started)
        return seconds[1:], first, time.perf_counter()

    with ThreadPoolExecutor(clients) as pool:
        seconds, first, last = zip(*pool.map(converse, range(clients)))
    return np.array(seconds), max(last) - min(first)
