"""One record per HTTP request: its id, who asked, what it cost, how it ended.

The outermost middleware opens it and, whatever happens below, closes it once. Everything that is told about
requests (counters, log lines, traces) reads a closed record, so they cannot disagree; everything that a request
took (its place in the queue) is given back then. Handlers find the record of their request with
`current_record`. It never holds a key, and prompts only if the settings ask for them.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepflash.assistant.stream import Usage, total_usage
from stepflash.server.cache_ledger import CacheReport, cache_headers
from stepflash.server.errors_by_path import message_response

MAX_FIELDS_SHOWN = 20
CLIENT_GONE = 499  # what is counted when the client leaves
# An id of the client's is kept if it can stand in a header and in a log line.
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger("stepflash.server")


@dataclass(slots=True, kw_only=True)
class AnswerRecord:
    """One answer of a request. Times in seconds; `finish_reason` as it was streamed, or "error" or "disconnect"."""

    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0
    usage: Usage = field(default_factory=Usage)
    finish_reason: str = "disconnect"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """`client` is the name of the key, or the address where there are no keys. `started_at` is on the monotonic
    clock, `started_ns` in nanoseconds since the epoch. `outcome` replaces the status that the client saw, for
    what happened after the head was sent. `unknown_fields` of the body meant nothing. `send` is the
    connection's own, for what no middleware looks at: a body, when the head has gone through all of them."""

    request_id: str
    method: str
    path: str
    headers: Headers
    client: str
    started_at: float
    started_ns: int
    send: Send
    route: str = "other"
    status: int = 0
    outcome: int | None = None
    seconds: float = 0.0
    num_body_bytes: int = 0
    unknown_fields: list[str] = field(default_factory=list)
    num_open_answers: int = 0
    answers: list[AnswerRecord] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    cache_reports: list[CacheReport] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        return total_usage([answer.usage for answer in self.answers])


_current: ContextVar[RequestRecord] = ContextVar("stepflash_request_record")


def current_record() -> RequestRecord:
    """The record of the request that is being handled."""
    return _current.get()


class RequestRecords:
    """ASGI middleware; every answer carries the id as `request-id` (Anthropic) and `x-request-id` (OpenAI)."""

    def __init__(self, app: ASGIApp, closed: Sequence[Callable[[RequestRecord], None]]) -> None:
        self.app = app
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = _open(scope, send)
        _current.set(record)
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["request-id"] = headers["x-request-id"] = record.request_id
                headers.update(cache_headers(record.cache_reports))
                if record.unknown_fields:
                    headers["x-stepflash-ignored-fields"] = _field_names(record.unknown_fields)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:  # a bug of ours: the request fails alone, the process goes on
            log.exception("%s %s failed", record.method, record.path)
            record.outcome = 500
            if not is_started:
                await message_response(record.path, 500, "internal error", record.request_id)(
                    scope, receive, send_with_id
                )
        finally:
            record.status = record.outcome or record.status or CLIENT_GONE
            record.seconds = time.monotonic() - record.started_at
            record.route = _route_of(scope)
            for told in self._closed:
                told(record)


def _route_of(scope: Scope) -> str:
    """The route, not the path: whoever asks for many paths must not create many counters. Where keys or limits
    refused a request nobody has looked for its route yet."""
    route = scope.get("route")
    if route is None:
        routes = scope["app"].routes if "app" in scope else ()
        route = next((one for one in routes if one.matches(scope)[0] is not Match.NONE), None)
    return getattr(route, "path", "other")


def _field_names(names: Sequence[str]) -> str:
    """As many as a header should hold, in letters that it can."""
    shown = [re.sub(r"[^\x21-\x7e]|,", "?", name)[:40] for name in names[:MAX_FIELDS_SHOWN]]
    return ", ".join(shown + ["..."] * (len(names) > MAX_FIELDS_SHOWN))


def _open(scope: Scope, send: Send) -> RequestRecord:
    headers = Headers(scope=scope)
    given = headers.get("x-request-id", "")
    address = scope.get("client")
    return RequestRecord(
        request_id=given if _CLIENT_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}",
        method=scope["method"],
        path=scope["path"],
        headers=headers,
        client=address[0] if address else "local",
        started_at=time.monotonic(),
        started_ns=time.time_ns(),
        send=send,
    )
