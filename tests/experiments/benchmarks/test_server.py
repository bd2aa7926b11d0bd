import threading
import time

import numpy as np
import pytest

from experiments.benchmarks import server as benchmark
from mbpo_jax.serving.server import serving_in_thread

WORK = 0.05


class Sleeper:
    """Takes WORK seconds for a batch of at most two requests."""

    metadata = {"image_size": 8}  # noqa: RUF012
    max_batch = 2

    def request(self, message, identity):
        return message["observation/image"].shape

    def infer(self, requests):
        assert len(requests) <= self.max_batch
        time.sleep(WORK)
        return np.zeros((len(requests), 1, 7), np.float32)


def test_latency_is_the_wait_for_ones_own_batch_and_those_before_it():
    with serving_in_thread(Sleeper(), requests_per_second=float("inf")) as (port, _):
        alone, wall = benchmark.load(port, clients=1, requests=5)
        assert alone.shape == (1, 5)
        assert alone.min() >= WORK
        assert wall >= 5 * WORK
        many, wall = benchmark.load(port, clients=4, requests=5)
    assert many.shape == (4, 5)
    assert wall >= 10 * WORK  # 20 chunks, two at a time
    assert np.median(many) > 1.5 * WORK


def test_an_error_of_the_server_ends_the_benchmark():
    with (
        serving_in_thread(Sleeper(), requests_per_second=1) as (port, _),
        pytest.raises((RuntimeError, threading.BrokenBarrierError), match="1 requests per second"),
    ):
        benchmark.load(port, clients=1, requests=3)
