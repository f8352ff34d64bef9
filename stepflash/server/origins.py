"""Which web pages may use the API: by default none but our own.

A browser asks before it lets a page read from another origin; without `--cors-origin` the answer is no. That
alone does not keep a page from sending a request whose answer it cannot read, so a request that comes from
a foreign page is refused as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from stepflash.server.errors_by_path import message_response
from stepflash.server.request_records import current_record

EXPOSED_HEADERS = (
    "request-id",
    "x-request-id",
    "retry-after",
    "x-stepflash-ignored-fields",
    "x-stepflash-prompt-tokens",
    "x-stepflash-cached-tokens",
    "x-stepflash-cache-miss",
)


class OriginGuard:
    """ASGI middleware; `origins` are those of pages that may use the API, as in `https://chat.example`, `*` for
    all. Programs send no origin and are not concerned."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self.app = app
        self._origins = frozenset(origins)
        self._cors = CORSMiddleware(
            app,
            allow_origins=tuple(origins),
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if scope["type"] != "http" or origin is None or _host(origin) == headers.get("host", ""):
            await self.app(scope, receive, send)
        elif origin in self._origins or "*" in self._origins:
            await self._cors(scope, receive, send)
        else:
            path = scope["path"]
            text = f"pages of {origin!r} may not use this server; --cors-origin {origin} would let them"
            request_id = current_record().request_id
            await message_response(path, 403, text, request_id, code="origin_not_allowed")(
                scope, receive, send
            )


def _host(origin: str) -> str:
    return origin.partition("://")[2]
