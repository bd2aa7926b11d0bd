"""SIGTERM, as preemptible machines send it: keep what there is, say so, and exit with status 0.

Where several processes share a program, JAX listens to it instead (its preemption service): one
that any of them receives stops all of them after the same step, and what comes between loops is
heard in the next one.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """The process was asked to end and nothing is lost; uncaught, it ends with status 0."""

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """SIGTERM prints `message` and ends the process with status 0, at once.

    For work that may be left anywhere because its results appear on disk one by one and complete,
    as collected episodes do. An exception instead would be lost where it is raised in a callback of
    the garbage collector, and would need time for the way out.
    """

    def leave(*_):
        os.write(1, f"{message}\n".encode())  # print is not allowed to interrupt itself
        os._exit(0)

    with _handler(leave):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[int], bool]]:
    """SIGTERM is only noted; the yielded function, to be called with the number of every step, says
    whether to stop after it.

    For loops that must finish a step and save before they raise `Interrupted` themselves. One that
    came too late for that is raised at the end.
    """
    noted = threading.Event()

    def asked(step: int) -> bool:
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            noted.set()
        return noted.is_set()

    with _handler(lambda *_: noted.set()):
        yield asked
    if noted.is_set():
        raise Interrupted("stopped by SIGTERM after the last step; everything is saved")


@contextlib.contextmanager
def _handler(handler) -> Iterator[None]:
    if jax.distributed.is_initialized() or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield  # only the main thread may have handlers, and only it receives signals
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
