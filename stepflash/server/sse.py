"""Server-sent events, and the end of a request whose client has gone.

A streamed reply is an async generator of complete frames. Whatever ends the reply (its last frame, an
exception, a client that disconnects) closes the generator, and closing it aborts the engine's request.
While nothing is sent for some seconds, a `KeepAlive` frame keeps proxies and clients from giving up. When the
server's time is over, the last words of the stream say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from stepflash.errors import ServerClosing
from stepflash.server.closing import Closing

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
DONE = b"data: [DONE]\n\n"
_TEXT = secrets.token_hex(16)  # nobody else's text

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """What to send after so many seconds of silence. The frame is made when it is sent, after all before it."""

    seconds: float
    frame: Callable[[], bytes]


COMMENTS = KeepAlive(10.0, lambda: b": keep-alive\n\n")


class ClientGone(Exception):
    """The client disconnected; there is nobody to answer."""


def frame(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One `data:` frame, after an `event:` line if the event has a name."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + _encode(data).encode("utf-8", "replace") + b"\n\n"


def text_frame(data: Callable[[str], Mapping[str, Any]]) -> Callable[[str], bytes]:
    """`frame(data(text))` for many texts, which stand somewhere in `data` as they are: what is around them is encoded
    once."""
    parts = frame(data(_TEXT)).split(_quoted(_TEXT))
    return lambda text: _quoted(text).join(parts)


def _quoted(text: str) -> bytes:
    return json.encoder.encode_basestring(text).encode("utf-8", "replace")


class EventStream(Response):
    """Sends a generator of frames and closes it at the end, however that comes about."""

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes],
        closing: Closing,
        last_words: Callable[[], bytes],
        *,
        last_frame: bytes = b"",
        keep_alive: KeepAlive = COMMENTS,
        send_seconds: float | None = None,
        send_body: Send | None = None,
    ) -> None:
        """`last_words` make the frames that end the stream when `closing` does. `send_seconds`: a client that takes
        nothing for so long is taken to be gone. `send_body` sends what follows the head past the middlewares, which
        would cost a frame as much as its encoding does."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.send_seconds = math.inf if send_seconds is None else send_seconds
        self._send_body = send_body
        self._last_frame = last_frame
        del self.headers["content-length"]
        self._frames = frames
        self._closing = closing
        self._last_words = last_words
        self._is_started = False
        self.keep_alive = keep_alive
        self.longest_wait = min(self.send_seconds, keep_alive.seconds)
        self.sent_at = time.monotonic()
        self.sending_since: float | None = None  # while a frame is on its way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(send), self._closing)
        except ClientGone:
            return
        except ServerClosing:
            if not self._is_started:
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.send_seconds):
                    await send(_body(self._last_words(), more_body=False))

    async def _send_all(self, send: Send) -> None:
        """Raises ClientGone when the client takes nothing any more."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        send_body = self._send_body or send
        try:
            async with asyncio.timeout(None) as patience:
                watch = _Watch(self, send_body, patience)
                try:
                    await self._send(send, start)
                    self._is_started = True
                    async with aclosing(self._frames) as frames:
                        async for data in frames:
                            self.sending_since = time.monotonic()
                            await send_body({"type": "http.response.body", "body": data, "more_body": True})
                            self.sent_at, self.sending_since = self.sending_since, None
                    await self._send(send_body, _body(self._last_frame, more_body=False))
                finally:
                    watch.end()
        except TimeoutError:
            raise ClientGone from None

    async def _send(self, send: Send, message: Message) -> None:
        self.sending_since = time.monotonic()
        await send(message)
        self.sent_at, self.sending_since = self.sending_since, None


class _Watch:
    """Breaks a silence of a stream; ends `patience` when a frame is not taken.

    One timer looks after all frames: one for each would cost as much as the frame.
    """

    def __init__(self, stream: EventStream, send: Send, patience: asyncio.Timeout) -> None:
        self._stream = stream
        self._send = send
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(stream.longest_wait, self._look)

    def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _look(self) -> None:
        stream, sending_since = self._stream, self._stream.sending_since
        if sending_since is None:
            left = stream.sent_at + stream.keep_alive.seconds - time.monotonic()
        else:
            left = sending_since + stream.send_seconds - time.monotonic()
        if left > 0:
            # Not for longer than any limit: a frame that is begun meanwhile is seen in time.
            self._timer = self._loop.call_later(min(left, stream.longest_wait), self._look)
        elif sending_since is None:
            self._task = asyncio.create_task(self._break_silence())
        else:
            self._patience.reschedule(0)

    async def _break_silence(self) -> None:
        try:
            async with asyncio.timeout(self._stream.send_seconds):
                await self._send(_body(self._stream.keep_alive.frame()))
        except TimeoutError:
            self._patience.reschedule(0)
            return
        self._stream.sent_at = time.monotonic()
        self._look()


def _body(data: bytes, *, more_body: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T], closing: Closing) -> T:
    """The result of `work`, which is cancelled as soon as the client disconnects or the server's time is over.

    The request's body must have been read.

    Raises:
        ClientGone: the client went first.
        ServerClosing: the time was over first.
    """
    why: Exception | None = None
    is_running = True

    def end(error: Exception) -> None:
        nonlocal why
        if is_running and why is None:
            why = error
            scope.reschedule(0)

    def end_if_gone(watching: asyncio.Task[None]) -> None:
        if not watching.cancelled():
            end(ClientGone())

    try:
        async with asyncio.timeout(None) as scope:
            watching = asyncio.create_task(_wait_for_disconnect(receive))
            watching.add_done_callback(end_if_gone)
            try:
                with closing.notice(lambda: end(closing.error())):
                    # Requests that came together are all prepared before the first of them is submitted: the engine
                    # begins with all of them at once, and does not take the interpreter from those still prepared.
                    await asyncio.sleep(0)
                    return await work
            finally:
                is_running = False
                watching.cancel()
                work.close()  # it may not have begun
    except Exception:
        if why is not None:
            raise why from None
        raise


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
