"""The worker process of a pool: runs one episode after another on its own simulator.

Started as `python -m mbpo_jax.envs.workers.worker FILE_DESCRIPTOR`. It is a program of its own
rather than a multiprocessing child, so that it never imports the caller's main module and with it
JAX.
"""

import contextlib
import dataclasses
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from mbpo_jax.envs import suites
from mbpo_jax.envs.requests import BranchRequest, EpisodeRequest, Failure, Query
from mbpo_jax.envs.sim.rollout import run_branches, run_expert, run_policy
from mbpo_jax.envs.sim.simulator import RobosuiteEnv


@dataclasses.dataclass(frozen=True)
class EnvSettings:
    """The arguments of `suites.make_env` that all episodes of a pool share."""

    suite: str
    cameras: tuple[str, ...]
    image_size: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Job:
    """An episode for a worker, `source` being None for the expert, else the policy's name; or
    branches of one."""

    request: EpisodeRequest | BranchRequest
    source: str | None = None


class _PoolGone(Exception):
    """The pool's end of the connection is closed."""


class Worker:
    """Answers jobs with results; holds one environment, of the task that came last."""

    def __init__(self, connection: Connection, settings: EnvSettings):
        self._connection, self._settings = connection, settings
        self._env: RobosuiteEnv | None = None

    def run(self, job: Job) -> Any:
        env = self._environment(job.request.task_id)
        if isinstance(job.request, BranchRequest):
            return run_branches(env, job.request)
        if job.source is None:
            return run_expert(env, job.request, suites.expert_actions)
        return run_policy(env, job.request, self._ask, job.source)

    def _environment(self, task_id: int) -> RobosuiteEnv:
        if self._env is None or self._env.task_id != task_id:
            if self._env is not None:
                self._env.close()
            self._env = suites.make_env(task_id=task_id, **dataclasses.asdict(self._settings))
        return self._env

    def _ask(self, query: Query) -> np.ndarray:
        try:
            self._connection.send(query)
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise _PoolGone from error


def describe(error: Exception) -> str:
    """One message; where it is not one of those that are written for users, with its kind and
    place."""
    if str(error) and isinstance(error, (ValueError, RuntimeError, ImportError, OSError)):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def main(descriptor: int) -> None:
    # Ctrl-C reaches the whole process group; the pool decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The end of the connection means that the pool has gone, however it went.
    gone = contextlib.suppress(EOFError, ConnectionError, _PoolGone)
    with Connection(descriptor) as connection, gone:
        worker = Worker(connection, connection.recv())
        while True:
            job = connection.recv()
            try:
                answer = worker.run(job)
            except _PoolGone:
                raise
            except Exception as error:  # any failure belongs to the caller, who tells it
                traceback.print_exc()
                answer = Failure(describe(error))
            connection.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
