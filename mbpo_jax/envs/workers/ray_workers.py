"""Workers on the hosts of a Ray cluster: one actor each, which keeps a worker process there."""

import contextlib
from collections.abc import Sequence
from typing import Any

import ray

from mbpo_jax.envs.workers import local_workers
from mbpo_jax.envs.workers.local_workers import Death, LocalWorker
from mbpo_jax.envs.workers.worker import EnvSettings

_PATIENCE_S = 30.0  # for an actor's answer about a process that may hang
_NO_ACTOR = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)


@ray.remote(num_cpus=1, max_restarts=0, max_concurrency=2, scheduling_strategy="SPREAD")
class _Host:
    """Holds a worker process on its host. The second thread is for the process's end, when the
    first waits for an answer."""

    def __init__(self, settings: EnvSettings, command: Sequence[str]):
        self._worker = LocalWorker(settings, command)

    def exchange(self, message: Any) -> Any:
        self._worker.send(message)
        return self._worker.receive()

    def last_words(self) -> str:
        return self._worker.last_words()

    def kill(self) -> None:
        self._worker.process.kill()
        self._worker.process.wait()


class RayWorker:
    def __init__(self, settings: EnvSettings):
        self._actor = _Host.remote(settings, local_workers.WORKER_COMMAND)
        self.answer: ray.ObjectRef | None = None

    def send(self, message: Any) -> None:
        self.answer = self._actor.exchange.remote(message)

    def receive(self) -> Any:
        """The answer, which is there, or the `Death` of the process, its actor or its host."""
        try:
            return ray.get(self.answer)
        except ray.exceptions.RayActorError as error:
            return Death("was lost with its Ray actor", str(error))

    def last_words(self) -> str:
        try:
            return ray.get(self._actor.last_words.remote(), timeout=_PATIENCE_S)
        except _NO_ACTOR as error:
            return f"(no log: {error})"

    def kill(self) -> None:
        # The process of a lost actor ends with its connection.
        with contextlib.suppress(*_NO_ACTOR):
            ray.get(self._actor.kill.remote(), timeout=_PATIENCE_S)
        ray.kill(self._actor)


class RayBackend:
    """Workers as actors of the Ray cluster that `ray.init()` finds (`RAY_ADDRESS`, or a cluster
    that runs on this machine), spread over its hosts; without one, of one on this machine alone.
    Every host needs this package installed.

    Raises:
        ValueError: the cluster has fewer CPUs than `num_workers`.
    """

    def __init__(self, num_workers: int):
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(log_to_driver=False)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if num_workers > cpus:
            self.close()
            raise ValueError(
                f"{num_workers} workers need a CPU each, the Ray cluster has {cpus}: lower "
                "`workers` or add hosts (ray start --address=HEAD)"
            )

    def start(self, settings: EnvSettings) -> RayWorker:
        return RayWorker(settings)

    def wait(self, workers, timeout_s):
        by_answer = {worker.answer: worker for worker in workers}
        ray.wait([*by_answer], num_returns=1, timeout=timeout_s)
        ready, _ = ray.wait([*by_answer], num_returns=len(by_answer), timeout=0)
        return [(by_answer[answer], by_answer[answer].receive()) for answer in ready]

    def close(self) -> None:
        if self._ours:
            ray.shutdown()
