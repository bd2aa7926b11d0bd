"""A WebSocket server that speaks openpi's policy protocol and batches concurrent requests.

A client is sent the policy's metadata when it connects; then every binary message it sends is an
observation and is answered with a chunk, `{"actions": float32 [k, A], "policy_timing",
"server_timing"}`, or with a text that says what was wrong with it. `GET /healthz` answers 200.
"""

import asyncio
import contextlib
import hmac
import http
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from websockets.asyncio.server import Request as HandshakeRequest
from websockets.asyncio.server import Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from mbpo_jax.serving.inference import Request, ServedPolicy
from mbpo_jax.serving.protocol import SHUTTING_DOWN, pack, unpack

logger = logging.getLogger(__name__)


class RateLimit:
    """A token bucket: `per_second` on average, and as many at once."""

    def __init__(self, per_second: float, now: float):
        self._per_second = per_second
        self._tokens, self._last = max(per_second, 1.0), now

    def admits(self, now: float) -> bool:
        """Whether something may happen at the time `now` (s); if so, it has."""
        earned = (now - self._last) * self._per_second
        self._tokens = min(self._tokens + earned, max(self._per_second, 1.0))
        self._last = now
        admitted = self._tokens >= 1
        self._tokens -= admitted
        return admitted


class _Waiting(NamedTuple):
    request: Request
    answer: asyncio.Future  # of (actions, seconds of the policy)


class PolicyServer:
    """Serves one policy until it is stopped.

    Args:
        api_key: what clients must send as `Authorization: Api-Key KEY`; None for no such check.
        max_message_bytes: a longer message closes its connection (code 1009).
        requests_per_second: of one connection; what is beyond gets an error for an answer.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        api_key: str | None = None,
        max_message_bytes: int = 16 * 2**20,
        requests_per_second: float = 100.0,
    ):
        self._policy = policy
        self._api_key = api_key
        self._max_message_bytes = max_message_bytes
        self._requests_per_second = requests_per_second
        self._numbers = itertools.count()

    async def run(
        self, host: str, port: int, stop: asyncio.Event, started: Callable[[int], None]
    ) -> None:
        """Serves until `stop` is set; then takes no new connection or request, answers those that
        are in work and closes the connections (code 1001).

        Args:
            port: 0 for any that is free.
            started: called with the port once clients can connect.

        Raises:
            OSError: the port is taken.
        """
        self._stop = stop
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._in_work, self._idle = 0, asyncio.Event()
        self._idle.set()
        batches = asyncio.create_task(self._run_batches())
        try:
            async with serve(
                self._converse,
                host,
                port,
                process_request=self._admit,
                origins=[None],  # browsers send one: no page may talk to a robot's policy
                compression=None,
                max_size=self._max_message_bytes,
                max_queue=1,
            ) as server:
                started(server.sockets[0].getsockname()[1])
                await stop.wait()
                server.close(close_connections=False)
                await self._idle.wait()
                going = [c.close(CloseCode.GOING_AWAY, "shutting down") for c in server.connections]
                await asyncio.gather(*going)
        finally:
            batches.cancel()

    def _admit(self, connection: ServerConnection, request: HandshakeRequest) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self._api_key is not None:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Api-Key {self._api_key}".encode()):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or no API key\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        number, chunks = next(self._numbers) % 2**31, itertools.count()
        limit = RateLimit(self._requests_per_second, time.monotonic())
        try:
            await connection.send(pack(self._policy.metadata))
            previous = None
            async for message in connection:
                started = time.monotonic()
                self._in_work += 1
                self._idle.clear()
                try:
                    answer = await self._answer(message, (number, next(chunks)), limit)
                    if isinstance(answer, dict) and previous is not None:
                        answer["server_timing"]["prev_total_ms"] = 1e3 * previous
                    await connection.send(answer if isinstance(answer, str) else pack(answer))
                finally:
                    self._in_work -= 1
                    if not self._in_work:
                        self._idle.set()
                previous = time.monotonic() - started
        except ConnectionClosed as closed:
            logger.info("connection %d: %s", number, closed)

    async def _answer(
        self, message: bytes | str, identity: tuple[int, int], limit: RateLimit
    ) -> dict | str:
        """A chunk with its timing, or the text of an error."""
        started = time.monotonic()
        if self._stop.is_set():
            return SHUTTING_DOWN
        if not limit.admits(started):
            return f"error: more than {self._requests_per_second:g} requests per second"
        if isinstance(message, str):
            return "error: an observation is a binary message (MessagePack), not a text"
        try:
            request = self._policy.request(unpack(message), identity)
        except ValueError as error:
            return f"error: {error}"
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        actions, seconds = await waiting.answer
        return {
            "actions": actions,
            "policy_timing": {"infer_ms": 1e3 * seconds},
            "server_timing": {"infer_ms": 1e3 * (time.monotonic() - started)},
        }

    async def _run_batches(self) -> None:
        """Runs what has gathered while the previous batch was computed."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._policy.max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                results = await asyncio.to_thread(self._timed, [w.request for w in batch])
            except Exception as error:  # goes to those who wait for it; the others are served
                logger.exception("a batch of %d requests failed", len(batch))
                for waiting in batch:
                    waiting.answer.set_exception(error)
            else:
                for waiting, result in zip(batch, results):
                    waiting.answer.set_result(result)

    def _timed(self, requests: list[Request]) -> list[tuple[np.ndarray, float]]:
        started = time.monotonic()
        chunks = self._policy.infer(requests)
        seconds = time.monotonic() - started
        return [(chunk, seconds) for chunk in chunks]


@contextlib.contextmanager
def serving_in_thread(
    policy: ServedPolicy, **options: Any
) -> Iterator[tuple[int, Callable[[], None]]]:
    """A `PolicyServer(policy, **options)` on 127.0.0.1 in a thread: yields its port and a function
    that stops it. On the way out it is stopped and has ended."""
    address: Future = Future()

    async def run() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def started(port: int) -> None:
            address.set_result((port, lambda: loop.call_soon_threadsafe(stop.set)))

        await PolicyServer(policy, **options).run("127.0.0.1", 0, stop, started)

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(asyncio.run, run())
        port, stop = address.result(timeout=30)
        try:
            yield port, stop
        finally:
            if not ended.done():
                stop()
            ended.result()
