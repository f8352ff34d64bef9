"""What the routes of all APIs share: the session with its limits, and running answers under it.

A route reads the body with `read`, prepares prompts with `prepared`, and gets from `answers` one stream of items
each. What it encodes goes out through `event_stream`, or is collected under `unless_gone`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from stepflash.assistant.reader import Prompt
from stepflash.assistant.session import Session
from stepflash.assistant.stream import Progress, StreamItem, Usage
from stepflash.chat.canonical import canonical
from stepflash.chat.messages import Conversation
from stepflash.engine.request import SamplingParams
from stepflash.errors import EngineError, RequestError, StepflashError
from stepflash.server.metrics import Metrics
from stepflash.server.sse import COMMENTS, EventStream, KeepAlive, unless_disconnected
from stepflash.settings import ServerSettings

LARGE_BODY_BYTES = 32_768  # from here on, templates and tokenising leave the event loop
CLIENT_GONE = 499  # what is counted when the client leaves

log = logging.getLogger("stepflash.server")
T = TypeVar("T")


class Service:
    """One session under one model name. `defaults` are the sampling parameters of a request that names none."""

    def __init__(
        self, session: Session, model_name: str, settings: ServerSettings, defaults: SamplingParams
    ) -> None:
        self.session = session
        self.model_name = model_name
        self.settings = settings
        self.defaults = defaults
        self.metrics = Metrics()
        self.created = int(time.time())

    async def read(self, request: Request) -> bytes:
        """The body.

        Raises:
            HTTPException: 413, it is longer than the settings allow.
        """
        limit = self.settings.max_body_bytes
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if len(raw) > limit:
                raise HTTPException(413, f"the body is larger than {limit} bytes")
        return bytes(raw)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def canonical(self, conversation: Conversation) -> Conversation:
        """The conversation as it is rendered, without known noise if the settings say so."""
        return canonical(conversation) if self.settings.is_canonical else conversation

    async def prepared(self, prepare: Callable[[], T], num_bytes: int) -> T:
        """Render and encode: short prompts here, long ones in a thread, so that other streams go on."""
        return prepare() if num_bytes < LARGE_BODY_BYTES else await asyncio.to_thread(prepare)

    def answers(self, prompts: Sequence[Prompt]) -> list[AsyncGenerator[StreamItem]]:
        """Submit prompts.

        Raises:
            RequestError: the engine refuses one.
        """
        return [self._measured(self.session.answer(prompt)) for prompt in prompts]

    async def _measured(self, stream: AsyncGenerator[StreamItem]) -> AsyncGenerator[StreamItem]:
        """The stream, with its times and tokens counted however it ends."""
        started = time.monotonic()
        usage: Usage | None = None
        self.metrics.num_running += 1
        try:
            async with aclosing(stream):
                async for item in stream:
                    if isinstance(item, Progress):
                        if usage is None:
                            self.metrics.first_token_seconds.add(time.monotonic() - started)
                        usage = item.usage
                        self.metrics.last_token_at = time.monotonic()
                    yield item
        finally:
            self.metrics.num_running -= 1
            self.metrics.answer_seconds.add(time.monotonic() - started)
            if usage is not None:
                self.metrics.count_usage(usage)

    async def unless_gone(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, whose request is then counted as answered.

        Raises:
            ClientGone: the client went first; the work was cancelled.
        """
        result = await unless_disconnected(request.receive, work)
        self.count(request, 200)
        return result

    def event_stream(
        self,
        request: Request,
        frames: AsyncGenerator[bytes],
        error_frame: Callable[[StepflashError], bytes],
        *,
        last_frame: bytes = b"",
        keep_alive: KeepAlive = COMMENTS,
    ) -> EventStream:
        """A streamed reply. The head is sent first, so whatever fails later is told in the stream."""

        async def all_frames() -> AsyncGenerator[bytes]:
            status = CLIENT_GONE
            try:
                async with aclosing(frames):
                    async for data in frames:
                        yield data
                status = 200
            except StepflashError as error:
                status = 400 if isinstance(error, RequestError) else 500
                if status == 500:
                    log.error("%s %s: %s", request.method, request.url.path, error)
                yield error_frame(error)
            except Exception:  # a bug of ours, which must not end anything but this stream
                log.exception("%s %s failed in its stream", request.method, request.url.path)
                status = 500
                yield error_frame(EngineError("internal error"))
            finally:
                self.count(request, status)
            if last_frame:
                yield last_frame

        return EventStream(all_frames(), keep_alive)

    def count(self, request: Request, status: int) -> None:
        # By route, not by path: whoever asks for many paths must not create many counters.
        route = request.scope.get("route")
        self.metrics.count_request(getattr(route, "path", "other"), status)
