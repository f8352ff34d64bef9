"""Which web pages may use the API: by default none but our own.

A browser asks before it lets a page read from another origin; without `--cors-origin` the answer is no. That
alone does not keep a page from sending a request whose answer it cannot read, so a request that comes from
a foreign page is refused as well. A page is our own if its origin is the host that the request names, but anybody can
let a name of theirs point to this machine once their page is loaded ("DNS rebinding"). Without API keys, which such
a page does not have, names that anybody could own are therefore foreign.
"""

from __future__ import annotations

import ipaddress
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


# No public name server answers for these.
LOCAL_SUFFIXES = (".localhost", ".local", ".lan", ".internal", ".home.arpa")


class OriginGuard:
    """ASGI middleware; `origins` are those of pages that may use the API, as in `https://chat.example`, `*` for
    all; `has_keys`: every request needs a key. Programs send no origin and are not concerned."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], *, has_keys: bool) -> None:
        self.app = app
        self._has_keys = has_keys
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
        if scope["type"] != "http" or origin is None or self._is_own(origin, headers):
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

    def _is_own(self, origin: str, headers: Headers) -> bool:
        host = origin.partition("://")[2]
        return host == headers.get("host", "") and (self._has_keys or _is_local(host))


def _is_local(host: str) -> bool:
    """Whether a host is an address, or a name that cannot be somebody else's."""
    name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return "." not in name or name.lower().endswith(LOCAL_SUFFIXES)
