"""Worker processes: repeatable, repaired, and gone afterwards."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import jax
import numpy as np
import pytest

from mbpo_jax.envs.requests import EpisodeRequest, Failure
from mbpo_jax.envs.workers import worker
from mbpo_jax.envs.workers.pool import EnvPool, WorkerError


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def requests(*seeds):
    return [EpisodeRequest(0, seed=seed) for seed in seeds]


def test_a_crash_is_repaired_and_the_episode_repeated(fake_workers):
    with EnvPool("libero_10", 2) as pool:
        results = list(pool.expert_episodes(requests(1, 100, 2, 3)))
        assert sorted(result.request.seed for result in results) == [1, 2, 3, 100]
        assert pool.restarts == 1


def test_a_hang_is_repaired_and_the_episode_repeated(fake_workers):
    with EnvPool("libero_10", 2, timeout_s=10.0) as pool:
        results = list(pool.expert_episodes(requests(1, 200, 2)))
        assert sorted(result.request.seed for result in results) == [1, 2, 200]
        assert pool.restarts >= 1


def test_an_episode_that_always_crashes_is_an_error_with_its_last_words(fake_workers):
    with (
        EnvPool("libero_10", 1) as pool,
        pytest.raises(RuntimeError, match=r"(?s)seed=300.*3 times.*status 17.*segmentation fault"),
    ):
        list(pool.expert_episodes(requests(300)))


def test_an_exception_is_raised_here_and_ends_the_workers(fake_workers):
    with EnvPool("libero_10", 2) as pool:
        with pytest.raises(WorkerError, match="the goal is unknown"):
            list(pool.expert_episodes(requests(1, 400)))
        assert pool._seats == []
        assert [r.request.seed for r in pool.expert_episodes(requests(5))] == [5]


def test_a_worker_that_ends_by_an_exception_is_told_without_its_traceback(fake_workers):
    with EnvPool("libero_10", 1) as pool, pytest.raises(WorkerError) as error:
        list(pool.expert_episodes(requests(500)))
    assert "OSError: the disk is on fire" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "File" not in str(error.value)


def test_an_error_that_a_compiled_program_has_wrapped_is_told_as_it_was(fake_workers):
    def execute():
        with EnvPool("libero_10", 1) as pool:
            try:
                list(pool.expert_episodes(requests(400)))
            except WorkerError:
                raise jax.errors.JaxRuntimeError("INTERNAL: Traceback (most ...") from None

    with pytest.raises(WorkerError, match=r"^the goal is unknown$"):
        execute()


@pytest.mark.libero
def test_an_error_of_the_simulator_comes_from_the_worker_as_it_was_told(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    with EnvPool("libero_10", 1) as pool, pytest.raises(WorkerError, match="MUJOCO") as error:
        list(pool.expert_episodes(requests(1)))
    assert "Traceback" not in str(error.value)
    assert pool.restarts == 0


class Odd(Exception):
    """Of a kind that another process cannot make again from its arguments."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no OpenGL"),
        AssertionError("no such device"),
        ImportError("no simulator"),
        OSError("no file"),
        BrokenPipeError("no pipe of the simulator's"),
        EOFError("no input"),
        KeyError("no key"),
        AssertionError(),
        Odd("one", "two"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_an_episode_raises_on_a_worker_is_one_message(monkeypatch, error):
    """The worker's own program in a thread, at the other end of a connection."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("mbpo_jax.envs.suites.make_env", fail)
    monkeypatch.setattr("mbpo_jax.envs.workers.worker.signal.signal", lambda *_: None)
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as threads, Connection(ours.detach()) as connection:
        ended = threads.submit(worker.main, theirs.detach())
        connection.send(worker.EnvSettings("libero_10", ("agentview",), 32, 10))
        for _ in range(2):  # it lives on
            connection.send(worker.Job(EpisodeRequest(0, seed=1)))
            answer = connection.recv()
            assert isinstance(answer, Failure)
            assert str(error) in answer.message
            assert answer.message.strip()
            assert "Traceback" not in answer.message
        connection.close()
        ended.result(30)


def test_a_policy_answers_each_query(fake_workers):
    def act(queries):
        assert 1 <= len(queries) <= 2
        return np.stack([np.full((10, 7), q.proprio[0] + q.chunk_index) for q in queries])

    with EnvPool("libero_10", 2) as pool:
        results = list(pool.policy_episodes(requests(1, 2, 3), act))
    # Three chunks of 70 numbers: 70 * (3 * seed + 0 + 1 + 2).
    totals = {result.request.seed: result.episode for result in results}
    assert totals == {1: 70 * 6, 2: 70 * 9, 3: 70 * 12}


def test_a_policy_that_returns_too_few_chunks_is_refused(fake_workers):
    with (
        EnvPool("libero_10", 1) as pool,
        pytest.raises(ValueError, match="1 queries and returned 0 chunks"),
    ):
        list(pool.policy_episodes(requests(1), lambda _: np.zeros((0, 10, 7))))


@pytest.mark.parametrize("way_out", ["normally", "by an exception", "by Ctrl-C", "unfinished"])
def test_no_process_is_left_behind(fake_workers, way_out):
    # A shell's background jobs, such as this suite may be, ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pids = []

    def leave():
        with EnvPool("libero_10", 2) as pool:
            for _ in pool.expert_episodes(requests(1, 2, 3, 4)):
                pids.extend(seat.worker.process.pid for seat in pool._seats)
                if way_out == "by an exception":
                    raise ArithmeticError
                if way_out == "by Ctrl-C":
                    signal.raise_signal(signal.SIGINT)
                if way_out == "unfinished":
                    break

    expected = {"by an exception": ArithmeticError, "by Ctrl-C": KeyboardInterrupt}
    if way_out in expected:
        with pytest.raises(expected[way_out]):
            leave()
    else:
        leave()
    assert pids
    assert not any(alive(pid) for pid in pids)


def test_workers_end_when_the_pool_is_gone(fake_workers):
    pool = EnvPool("libero_10", 1)
    assert len(list(pool.expert_episodes(requests(1)))) == 1
    orphan = pool._seats.pop().worker
    orphan.connection.close()  # as when the parent is killed
    deadline = time.monotonic() + 20
    while orphan.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphan.process.poll() is not None


def test_a_pool_without_workers_is_refused():
    with pytest.raises(ValueError, match="at least one worker"):
        EnvPool("libero_10", 0)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="choose one of local, ray"):
        EnvPool("libero_10", 1, backend="slurm")


def noise_policy(queries):
    """Random chunks that depend on the request and the chunk's number alone."""
    return np.stack(
        [
            np.random.default_rng([q.request.seed, q.chunk_index]).uniform(-1, 1, (10, 7))
            for q in queries
        ]
    )


@pytest.mark.libero
def test_episodes_do_not_depend_on_the_number_of_workers(book_env):
    """Two workers in a pool against this process, on the real simulator."""
    from mbpo_jax.envs.sim.rollout import run_policy

    options = {"max_steps": 25, "render_every": 10, "video_size": 32}
    asked = [EpisodeRequest(5, seed=seed, **options) for seed in (0, 1, 2)]
    with EnvPool("libero_10", 2, image_size=64) as pool:
        results = {r.request: r for r in pool.policy_episodes(asked, noise_policy, "noise")}
    assert set(results) == set(asked)
    for request in asked:
        here = run_policy(book_env, request, lambda q: noise_policy([q])[0], "noise")
        there = results[request]
        assert there.episode.source == "noise"
        assert there.episode.length == 25
        np.testing.assert_array_equal(there.episode.timesteps, [0, 10, 20, 25])
        np.testing.assert_array_equal(there.episode.num_actions, [10, 10, 5, 0])
        np.testing.assert_array_equal(there.episode.proprio, here.episode.proprio)
        np.testing.assert_array_equal(there.episode.actions, here.episode.actions)
        for camera, frames in here.episode.images.items():
            np.testing.assert_array_equal(there.episode.images[camera], frames)
            # Every 4 steps and the end: 0, 4, ..., 24, 25.
            assert there.video[camera].shape == (8, 32, 32, 3)
            np.testing.assert_array_equal(there.video[camera], here.video[camera])


@pytest.mark.libero
def test_a_task_that_does_not_exist_starts_no_worker():
    with EnvPool("libero_10", 1) as pool:
        with pytest.raises(ValueError, match="the tasks 0 to 9; there is no 10"):
            list(pool.expert_episodes([EpisodeRequest(10, seed=0)]))
        assert pool._seats == []
