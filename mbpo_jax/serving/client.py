"""A policy behind openpi's websocket protocol, as one that acts here."""

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from mbpo_jax.serving.protocol import SHUTTING_DOWN, pack, unpack

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 16.0
_ANSWER_S = 600.0  # a server may compile for its first answer


class ServerGone(ConnectionError):
    """No server answers, although it was tried for a while; the message says where and why."""


class RemotePolicy:
    """A server of action chunks: this package's, openpi's, or any that speaks its protocol.

    Args:
        url: ws://HOST:PORT or wss://...
        connections: how many requests it is sent at once.
        patience_s: how long a server that is not there, or goes away, is waited for; in between it
            is tried at growing intervals.

    Attributes:
        metadata: what the server says of its policy; empty where it says nothing.

    Raises:
        ValueError: `url` is no such address, or the server refuses the key.
        ServerGone: nobody answers there.
    """

    def __init__(
        self,
        url: str,
        connections: int = 1,
        api_key: str | None = None,
        patience_s: float = 60.0,
    ):
        self._url, self._patience_s = url, patience_s
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._connections: list[ClientConnection | None] = [None] * connections
        self._ends = [contextlib.ExitStack() for _ in range(connections)]
        self._threads = ThreadPoolExecutor(connections)
        self.metadata: dict[str, Any] = {}
        for slot in range(connections):  # before one keeps the server busy
            self._patiently(slot, lambda _: None)

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for slot in range(len(self._connections)):
            self._hang_up(slot)

    def answer(self, messages: Sequence[Mapping]) -> list[np.ndarray]:
        """A chunk [k, A] for each of 1 to `connections` messages.

        Raises:
            ValueError: the server refuses a message, or its answer holds no actions.
            ServerGone: it went away and did not come back.
        """
        return list(self._threads.map(self._infer, itertools.count(), messages))

    def _infer(self, slot: int, message: Mapping) -> np.ndarray:
        data = pack(message)

        def ask(connection: ClientConnection) -> Any:
            connection.send(data)
            answer = connection.recv(timeout=_ANSWER_S)
            if answer == SHUTTING_DOWN:
                raise ConnectionError(answer)
            return answer

        answer = self._patiently(slot, ask)
        if isinstance(answer, str):  # of openpi's server it is a traceback
            raise ValueError(
                f"{self._url} refuses an observation: {answer.strip().rpartition(chr(10))[2]}"
            )
        content = unpack(answer)
        if not isinstance(content, dict) or "actions" not in content:
            found = sorted(map(str, content)) if isinstance(content, dict) else type(content)
            raise ValueError(f"{self._url} answers without 'actions'; there are {found}")
        return np.asarray(content["actions"], np.float32)

    def _patiently(self, slot: int, talk) -> Any:
        """What `talk` gives on the connection `slot`, which is made again whenever it breaks."""
        deadline, delay = time.monotonic() + self._patience_s, _FIRST_DELAY_S
        while True:
            try:
                return talk(self._connections[slot] or self._call(slot))
            except InvalidURI as error:
                raise ValueError(f"{self._url} is no address of a server: {error}") from error
            except InvalidStatus as error:
                self._hang_up(slot)
                if 400 <= error.response.status_code < 500:
                    said = (error.response.body or b"").decode(errors="replace").strip()
                    raise ValueError(
                        f"{self._url} refuses the connection: {error.response.status_code} {said}"
                    ) from error
                reason = error
            except (OSError, WebSocketException) as error:
                self._hang_up(slot)
                reason = error
            if time.monotonic() + delay > deadline:
                raise ServerGone(
                    f"no policy server answers at {self._url}, tried for {self._patience_s:g} s "
                    f"({str(reason) or type(reason).__name__})"
                ) from reason
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY_S)

    def _call(self, slot: int) -> ClientConnection:
        connection = self._ends[slot].enter_context(
            connect(
                self._url,
                compression=None,
                max_size=None,
                ping_interval=None,  # openpi's server answers no ping while its policy works
                additional_headers=self._headers,
            )
        )
        self._connections[slot] = connection
        metadata = unpack(connection.recv(timeout=_ANSWER_S))
        self.metadata = metadata if isinstance(metadata, dict) else {}
        return connection

    def _hang_up(self, slot: int) -> None:
        self._connections[slot] = None
        self._ends[slot].close()
