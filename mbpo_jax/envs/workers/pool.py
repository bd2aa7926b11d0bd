"""Worker processes that run episodes on the simulator side by side.

A worker that crashes or hangs is replaced and its episode repeated. An episode is a function of
its request (and of the policy's answers) alone, so neither that nor the number of workers shows in
the results, only in their order.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mbpo_jax.envs import suites
from mbpo_jax.envs.requests import (
    BranchRequest,
    BranchResult,
    EpisodeRequest,
    EpisodeResult,
    Query,
)
from mbpo_jax.envs.sim import libero
from mbpo_jax.envs.workers.local_workers import Backend, Death, LocalBackend, Worker
from mbpo_jax.envs.workers.worker import EnvSettings, Job

_MAX_FAILURES = 3  # of the same episode
BACKENDS = ("local", "ray")

# The queries of the workers that wait for a chunk -> their actions float [q, k, A].
PoolAct = Callable[[list[Query]], np.ndarray]


class WorkerError(RuntimeError):
    """An episode cannot be had from the workers; the message says why, as the worker told it."""


@dataclasses.dataclass(eq=False)
class _Seat:
    """A worker and what it is at; `deadline` is when its answer is overdue."""

    worker: Worker
    task_id: int = -1
    job: Job | None = None
    deadline: float = float("inf")


def _make_backend(name: str, num_workers: int) -> Backend:
    if name == "local":
        return LocalBackend()
    if name != "ray":
        raise ValueError(f"worker_backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    try:
        from mbpo_jax.envs.workers.ray_workers import RayBackend
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            "worker_backend = 'ray' needs Ray: pip install 'mbpo_jax[ray]', or choose 'local'"
        ) from error
    return RayBackend(num_workers)


class EnvPool:
    """`num_workers` processes with one simulator each (2.5 GB), for tasks of one suite: on this
    machine, or with `backend="ray"` on the hosts of a Ray cluster.

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
        backend: str = "local",
    ):
        if num_workers < 1:
            raise ValueError(f"a pool needs at least one worker, not {num_workers}")
        self._settings = EnvSettings(suite, tuple(cameras), image_size, chunk)
        self._num_workers, self._timeout_s = num_workers, timeout_s
        self._seats: list[_Seat] = []
        self._backend = _make_backend(backend, num_workers)
        self.restarts = 0
        self._error: WorkerError | None = None

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self._end_workers()
        self._backend.close()
        # A compiled program that calls the pool raises an exception of its own about it.
        if self._error not in (None, error) and isinstance(error, RuntimeError):
            raise self._error from None

    def expert_episodes(self, requests: Iterable[EpisodeRequest]) -> Iterator[EpisodeResult]:
        """Runs the scripted expert. Results come as they finish, in any order.

        Raises ValueError for a task that does not exist, and WorkerError for whatever an episode
        raises on its worker (a goal that the expert cannot achieve, no OpenGL) and when one has
        killed its worker three times.
        """
        for _, result in self._run([Job(request) for request in requests], None):
            yield result

    def policy_episodes(
        self,
        requests: Iterable[EpisodeRequest],
        act: PoolAct,
        source: str = "policy",
    ) -> Iterator[EpisodeResult]:
        """Runs a policy, whose name is `source`. Results come as they finish, in any order.

        act: maps the queries of all workers that wait for a chunk (1 to num_workers of them) to
        actions float [q, k, A]. Which queries come together depends on timing, so for repeatable
        episodes it must treat each by itself. Raises as `expert_episodes` does.
        """
        for _, result in self._run([Job(request, source) for request in requests], act):
            yield result

    def branches(
        self, requests: Iterable[BranchRequest]
    ) -> Iterator[tuple[BranchRequest, BranchResult]]:
        """Continues episodes from moments in them. Results come as they finish, in any order, each
        with its request. Raises as `expert_episodes` does."""
        for job, result in self._run([Job(request) for request in requests], None):
            yield job.request, result

    def _run(self, jobs: list[Job], act: PoolAct | None) -> Iterator[tuple[Job, Any]]:
        """Yields every job with its result."""
        for task_id in sorted({job.request.task_id for job in jobs}):
            suites.task_info(self._settings.suite, task_id)  # a wrong task fails here, not later
        self._error = None
        pending = collections.deque(jobs)
        failures: collections.Counter[Job] = collections.Counter()
        done = False
        try:
            while len(self._seats) < min(self._num_workers, len(jobs)):
                self._seats.append(_Seat(self._backend.start(self._settings)))
            while True:
                self._assign(pending)
                busy = [seat for seat in self._seats if seat.job]
                if not busy:
                    break
                asking = []
                for seat, message in self._messages(busy):
                    if isinstance(message, Query):
                        asking.append((seat, message))
                    elif isinstance(message, (EpisodeResult, BranchResult)):
                        finished, seat.job = seat.job, None
                        self._assign(pending)  # it works on while the caller has the result
                        yield finished, message
                    elif isinstance(message, Death):
                        failures[seat.job] += 1
                        if failures[seat.job] >= _MAX_FAILURES:
                            raise self._failed(
                                f"{seat.job.request} has failed {_MAX_FAILURES} times, at last "
                                f"because its worker {message.reason}. Its last words:\n"
                                f"{message.last_words}"
                            )
                        pending.appendleft(seat.job)
                        self._replace(seat)
                    else:
                        raise self._failed(message.message)
                if asking:
                    actions = np.asarray(act([query for _, query in asking]), np.float32)
                    if len(actions) != len(asking):
                        raise ValueError(
                            f"act got {len(asking)} queries and returned {len(actions)} chunks"
                        )
                    for (seat, _), chunk in zip(asking, actions):
                        self._send(seat, chunk)
            done = True
        finally:
            if not done:  # workers are in the middle of episodes that nobody waits for
                self._end_workers()

    def _failed(self, message: str) -> WorkerError:
        self._error = WorkerError(message)
        return self._error

    def _messages(self, busy: list[_Seat]) -> list[tuple[_Seat, Any]]:
        """Waits for the first answers or overdue workers; returns all that is there."""
        patience = max(0.0, min(seat.deadline for seat in busy) - time.monotonic())
        seats = {seat.worker: seat for seat in busy}
        answers = self._backend.wait([*seats], patience)
        messages = [(seats[worker], answer) for worker, answer in answers]
        answered = [seat for seat, _ in messages]
        for seat in busy:
            if seat not in answered and time.monotonic() > seat.deadline:
                reason = f"did not answer in {self._timeout_s:g} s"
                messages.append((seat, Death(reason, seat.worker.last_words())))
        return messages

    def _assign(self, pending: collections.deque[Job]) -> None:
        """Gives every idle worker an episode, of the task it has an environment for if possible."""
        for seat in self._seats:
            if seat.job is None and pending:
                same = (job for job in pending if job.request.task_id == seat.task_id)
                job = next(same, pending[0])
                pending.remove(job)
                seat.job, seat.task_id = job, job.request.task_id
                self._send(seat, job)

    def _send(self, seat: _Seat, message: Any) -> None:
        seat.deadline = time.monotonic() + self._timeout_s
        seat.worker.send(message)

    def _replace(self, seat: _Seat) -> None:
        seat.worker.kill()
        fresh = _Seat(self._backend.start(self._settings))
        self._seats[self._seats.index(seat)] = fresh
        self.restarts += 1

    def _end_workers(self) -> None:
        for seat in self._seats:
            seat.worker.kill()
        self._seats = []
