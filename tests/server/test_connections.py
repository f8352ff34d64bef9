"""Connections that cost the server something and bring it nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stepflash.server.app import create_app
from stepflash.server.connections import (
    KEPT_FILES,
    MAX_HELD_BYTES,
    JoinedWrites,
    connection_class,
    raise_file_limit,
)
from stepflash.settings import ServerSettings
from tests.scripted_engine import scripted_session
from tests.server.live import serving

ROOT = Path(__file__).parents[2]
BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()


@contextlib.contextmanager
def server(max_connections: int = 100, request_seconds: float = 0.5) -> Iterator[tuple[str, int]]:
    app = create_app(scripted_session("ok"), "scripted")
    with serving(app, http=connection_class(max_connections, request_seconds)) as url:
        yield url, int(url.rpartition(":")[2])


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        yield connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends it; waits for that up to the timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def send_headers(connection: socket.socket) -> None:
    """One at a time, for half a minute."""
    for number in range(600):
        connection.sendall(f"x-{number}: 1\r\n".encode())
        time.sleep(0.05)


def test_who_says_nothing_is_closed() -> None:
    with server() as (_, port), connected(port) as connection:
        assert is_closed(connection)


def test_who_sends_a_header_at_a_time_is_closed_all_the_same() -> None:
    with server() as (url, port), connected(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_headers(connection)
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_second_request_has_no_more_time_than_the_first() -> None:
    with server() as (_, port), connected(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        while b'"status":"ok"' not in received:
            received += connection.recv(4096)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        while rest := connection.recv(4096):
            received += rest
        assert received.count(b"HTTP/1.1") == 1


def test_a_body_may_take_longer_than_the_headers() -> None:
    with server() as (_, port), connected(port) as connection:
        connection.sendall(HEAD)
        time.sleep(1.0)
        connection.sendall(BODY)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_connections_beyond_the_number_are_closed_at_once_and_others_go_on() -> None:
    with server(max_connections=4, request_seconds=60) as (url, port), contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(port)) for _ in range(4)]
        assert is_closed(stack.enter_context(connected(port)))
        held[0].sendall(HEAD + BODY)
        assert held[0].recv(15) == b"HTTP/1.1 200 OK"
        held[1].close()
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                assert httpx.get(f"{url}/health").status_code == 200
                break
            assert time.monotonic() < deadline


def test_a_process_takes_the_files_that_it_may_have() -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from stepflash.server.connections import raise_file_limit
print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    text = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True)
    room, soft, hard = (int(word) for word in text.split())
    assert soft == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))
    assert room == soft - KEPT_FILES


def test_the_limit_is_taken_as_it_is_where_it_cannot_be_raised() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < raise_file_limit() <= max(soft, 65_536)


def test_a_body_that_announces_itself_too_large_is_refused_unread() -> None:
    settings = ServerSettings(max_body_bytes=1000)
    app = create_app(scripted_session("ok"), "scripted", settings=settings)
    with serving(app) as url, connected(int(url.rpartition(":")[2])) as connection:
        connection.sendall(HEAD.replace(str(len(BODY)).encode(), b"1001"))
        assert connection.recv(12) == b"HTTP/1.1 413"


class Written:
    """A transport that notes what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.writes.append(data)

    def close(self) -> None:
        self.is_closed = True


def test_what_is_written_in_one_turn_leaves_together_and_before_the_end() -> None:
    async def main() -> None:
        under = Written()
        transport = JoinedWrites(under, asyncio.get_running_loop())  # type: ignore[arg-type]
        for data in (b"head", b"first", b""):
            transport.write(data)
        assert under.writes == []
        await asyncio.sleep(0)
        assert under.writes == [b"headfirst"]
        transport.write(b"last")
        transport.close()
        assert under.writes == [b"headfirst", b"last"]
        await asyncio.sleep(0)
        assert under.writes == [b"headfirst", b"last"]
        assert under.is_closed

    asyncio.run(main())


def test_much_is_not_held_until_the_turn_ends() -> None:
    """Or a client that takes nothing would not stop who writes."""

    async def main() -> None:
        under = Written()
        transport = JoinedWrites(under, asyncio.get_running_loop())  # type: ignore[arg-type]
        pieces = [bytes([number]) * 10_000 for number in range(30)]
        for number, piece in enumerate(pieces, 1):
            transport.write(piece)
            assert number * 10_000 - sum(map(len, under.writes)) <= MAX_HELD_BYTES
        await asyncio.sleep(0)
        assert b"".join(under.writes) == b"".join(pieces)

    asyncio.run(main())
