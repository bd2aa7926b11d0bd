"""Worker processes that run episodes on the simulator side by side.

A worker that crashes or hangs is replaced and its episode repeated. An episode is a function of
its request (and of the policy's answers) alone, so neither that nor the number of workers shows in
the results, only in their order.
"""

import collections
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

import mbpo_jax
from mbpo_jax.envs import libero
from mbpo_jax.envs.requests import EpisodeRequest, EpisodeResult, Query
from mbpo_jax.envs.worker import EnvSettings, Job

_MAX_FAILURES = 3  # of the same episode
_WORKER_COMMAND = ("-m", "mbpo_jax.envs.worker")

# One thread a worker: the episodes are the parallelism.
_THREADS = {
    name: "1"
    for name in (
        "LP_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMBA_NUM_THREADS",
    )
}


@dataclasses.dataclass(eq=False)
class _Process:
    """A worker process as the pool sees it. `deadline` is when its answer is overdue."""

    process: subprocess.Popen
    connection: connection.Connection
    log: Any
    task_id: int = -1
    job: Job | None = None
    deadline: float = float("inf")

    def send(self, message: Any, timeout_s: float) -> None:
        self.deadline = time.monotonic() + timeout_s
        self.connection.send(message)

    def last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-15:])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.log.close()


class EnvPool:
    """`num_workers` processes with one simulator each (2.5 GB), for tasks of one suite.

    Use it as a context manager: on the way out, by whatever way, its processes end. `timeout_s` is
    how long one answer of a worker may take: an expert's episode or one chunk of a policy's, and
    the making of the environment before it. `restarts` counts the workers that were replaced.
    """

    def __init__(
        self,
        suite: str,
        num_workers: int = 2,
        cameras: Sequence[str] = libero.CAMERAS,
        image_size: int = 64,
        chunk: int = 10,
        timeout_s: float = 600.0,
    ):
        if num_workers < 1:
            raise ValueError(f"a pool needs at least one worker, not {num_workers}")
        self._settings = EnvSettings(suite, tuple(cameras), image_size, chunk)
        self._num_workers, self._timeout_s = num_workers, timeout_s
        self._workers: list[_Process] = []
        self.restarts = 0

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes; the next episodes would start new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def expert_episodes(self, requests: Iterable[EpisodeRequest]) -> Iterator[EpisodeResult]:
        """Runs the scripted expert. Results come as they finish, in any order.

        Raises what the episode raises on the worker (a task that does not exist, a goal that the
        expert cannot achieve, no OpenGL), and RuntimeError when an episode has killed its worker
        three times.
        """
        yield from self._run([Job(request, None) for request in requests], None)

    def policy_episodes(
        self,
        requests: Iterable[EpisodeRequest],
        act: Callable[[list[Query]], np.ndarray],
        source: str = "policy",
    ) -> Iterator[EpisodeResult]:
        """Runs a policy, whose name is `source`. Results come as they finish, in any order.

        act: maps the queries of all workers that wait for a chunk (1 to num_workers of them) to
        actions float [q, k, 7]. Which queries come together depends on timing, so for repeatable
        episodes it must treat each by itself. Raises as `expert_episodes` does.
        """
        yield from self._run([Job(request, source) for request in requests], act)

    def _run(
        self, jobs: list[Job], act: Callable[[list[Query]], np.ndarray] | None
    ) -> Iterator[EpisodeResult]:
        for task_id in sorted({job.request.task_id for job in jobs}):
            libero.task_info(self._settings.suite, task_id)  # a wrong task fails here, not later
        pending = collections.deque(jobs)
        failures: collections.Counter[Job] = collections.Counter()
        done = False
        try:
            while len(self._workers) < min(self._num_workers, len(jobs)):
                self._workers.append(self._start())
            while True:
                self._assign(pending)
                busy = [worker for worker in self._workers if worker.job]
                if not busy:
                    break
                asking = []
                for worker, message in self._messages(busy):
                    if isinstance(message, Query):
                        asking.append((worker, message))
                    elif isinstance(message, EpisodeResult):
                        worker.job = None
                        self._assign(pending)  # it works on while the caller has the result
                        yield message
                    elif isinstance(message, _Failure):
                        failures[worker.job] += 1
                        if failures[worker.job] >= _MAX_FAILURES:
                            raise RuntimeError(
                                f"{worker.job.request} has failed {_MAX_FAILURES} times, at last "
                                f"because its worker {message.reason}. Its last words:\n"
                                f"{message.last_words}"
                            )
                        pending.appendleft(worker.job)
                        self._replace(worker)
                    else:
                        raise message
                if asking:
                    actions = np.asarray(act([query for _, query in asking]), np.float32)
                    if len(actions) != len(asking):
                        raise ValueError(
                            f"act got {len(asking)} queries and returned {len(actions)} chunks"
                        )
                    for (worker, _), chunk in zip(asking, actions):
                        self._send(worker, chunk)
            done = True
        finally:
            if not done:  # workers are in the middle of episodes that nobody waits for
                self.close()

    def _messages(self, busy: list[_Process]) -> list[tuple[_Process, Any]]:
        """Waits for the first message or overdue worker; returns all that is there."""
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        ready = connection.wait([worker.connection for worker in busy], patience)
        messages = []
        for worker in busy:
            if worker.connection in ready:
                try:
                    messages.append((worker, worker.connection.recv()))
                except (EOFError, ConnectionError):
                    code = worker.process.wait()
                    reason = f"died with exit status {code}"
                    messages.append((worker, _Failure(reason, worker.last_words())))
            elif time.monotonic() > worker.deadline:
                reason = f"did not answer in {self._timeout_s:g} s"
                messages.append((worker, _Failure(reason, worker.last_words())))
        return messages

    def _assign(self, pending: collections.deque[Job]) -> None:
        """Gives every idle worker an episode, of the task it has an environment for if possible."""
        for worker in self._workers:
            if worker.job is None and pending:
                same = (job for job in pending if job.request.task_id == worker.task_id)
                job = next(same, pending[0])
                pending.remove(job)
                worker.job, worker.task_id = job, job.request.task_id
                self._send(worker, job)

    def _send(self, worker: _Process, message: Any) -> None:
        try:
            worker.send(message, self._timeout_s)
        except ConnectionError:
            worker.deadline = 0.0  # it has died; the next look at its connection finds out

    def _replace(self, worker: _Process) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = self._start()
        self.restarts += 1

    def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        root = str(Path(mbpo_jax.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *_WORKER_COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **_THREADS, "PYTHONPATH": os.pathsep.join(paths)},
            )
        worker = _Process(process, connection.Connection(ours.detach()), log)
        self._send(worker, self._settings)
        worker.deadline = float("inf")
        return worker


@dataclasses.dataclass(frozen=True)
class _Failure:
    """A worker that died or is overdue."""

    reason: str
    last_words: str
