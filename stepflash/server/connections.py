"""What a connection may cost before it has sent a request.

Whoever opens connections and says nothing, or a header at a time, needs no key for it. Such a connection is closed
after a while, and beyond a number that leaves files to everything else new ones are closed at once: a process that
has no files left to open cannot even answer that it is alive.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0  # from the first byte, or the connection, to the end of the headers
MAX_HELD_BYTES = 65_536
WANTED_FILES, KEPT_FILES = 65_536, 128


def raise_file_limit() -> int:
    """Let this process open as many files as it may; how many connections that is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = WANTED_FILES if soft == resource.RLIM_INFINITY else soft
    return max(files - KEPT_FILES, files // 2)


class JoinedWrites:
    """A transport by which all that is written in one turn of the event loop leaves in one system call.

    A reply begins with a head and a first frame and ends with several frames and the end of the body; each would else
    be a packet of its own, and wake the client.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self._num_held = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._num_held += len(data)
        # The transport under this one stops whoever writes more than is taken, within a turn if need be.
        if self._num_held > MAX_HELD_BYTES:
            self._flush()

    def _flush(self) -> None:
        data, self._held, self._num_held = b"".join(self._held), [], 0
        if data:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()


def connection_class(max_connections: int, request_seconds: float = REQUEST_SECONDS) -> type[H11Protocol]:
    """The protocol of a server that keeps to these limits."""

    class Connection(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            joined: Any = JoinedWrites(transport, self.loop)
            super().connection_made(joined)
            if len(self.connections) > max_connections:
                transport.abort()
            else:
                self._wait_for_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait_for_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_request(self) -> None:
            """While the headers are not complete, one and the same timer runs."""
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._patience is None:
                self._patience = self.loop.call_later(request_seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Connection
