"""What a pool needs of its workers, and workers that are processes of this machine.

A worker and its pool talk in turn: every message to it, but for the settings it starts with, has
one answer.
"""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

import mbpo_jax
from mbpo_jax.envs.workers.worker import EnvSettings

WORKER_COMMAND = ("-m", "mbpo_jax.envs.workers.worker")

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


@dataclasses.dataclass(frozen=True)
class Death:
    """In place of an answer: the worker is dead or lost; `last_words` end its log."""

    reason: str
    last_words: str


class Worker(Protocol):
    def send(self, message: Any) -> None:
        """Sends a message; a worker that has died shows when its answer is waited for."""

    def last_words(self) -> str:
        """The end of its log."""

    def kill(self) -> None:
        """Ends it, whatever it does, and waits for that."""


class Backend(Protocol):
    """Where workers run."""

    def start(self, settings: EnvSettings) -> Worker: ...

    def wait(self, workers: Sequence[Any], timeout_s: float) -> list[tuple[Any, Any]]:
        """(worker, answer or `Death`) of those of `workers` that answer first; none if nobody does
        in `timeout_s`. All `workers` were sent a message since their last answer."""

    def close(self) -> None:
        """Ends what is not a worker's."""


class LocalWorker:
    """A process of its own (`mbpo_jax.envs.workers.worker`), which logs to a temporary file."""

    def __init__(self, settings: EnvSettings, command: Sequence[str] = WORKER_COMMAND):
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        root = str(Path(mbpo_jax.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **_THREADS, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self.connection = connection.Connection(ours.detach())
        self.send(settings)

    def send(self, message: Any) -> None:
        with contextlib.suppress(ConnectionError):  # it has died, which `receive` reports
            self.connection.send(message)

    def receive(self) -> Any:
        """Waits for the answer, or the `Death` that came before it."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            reason = f"died with exit status {self.process.wait()}"
            return Death(reason, self.last_words())

    def last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(without_tracebacks(lines)[-15:])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self._log.close()


def without_tracebacks(lines: Sequence[str]) -> list[str]:
    """A log with the last line alone of every traceback, which says what was raised."""
    kept, inside = [], False
    for line in lines:
        inside |= line.startswith("Traceback (most recent call last)")
        inside &= line.startswith((" ", "Traceback")) or not line
        if not inside:
            kept.append(line)
    return kept


class LocalBackend:
    def start(self, settings: EnvSettings) -> LocalWorker:
        return LocalWorker(settings, WORKER_COMMAND)

    def wait(self, workers, timeout_s):
        ready = connection.wait([worker.connection for worker in workers], timeout_s)
        return [(worker, worker.receive()) for worker in workers if worker.connection in ready]

    def close(self) -> None:
        pass  # there is nothing but the workers
