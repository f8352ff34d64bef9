"""API keys: every route but the health check is closed to whoever has none.

Accepted are `Authorization: Bearer KEY`, `x-api-key: KEY` and, for browsers opening the page, HTTP basic
authentication with the key as password. Comparing takes the same time whether or not a key is right.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stepflash.server.errors_by_path import message_response

OPEN_PATHS = frozenset({"/health"})


class KeyGuard:
    """ASGI middleware that answers 401 to requests without one of `keys`; no keys, no guard."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        if self._is_allowed(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        is_page = path == "/" or path.startswith("/page/")
        response = message_response(
            path,
            401,
            "a valid API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            code="invalid_api_key",
            headers={"www-authenticate": f'{"Basic" if is_page else "Bearer"} realm="stepflash"'},
        )
        await response(scope, receive, send)

    def _is_allowed(self, headers: Headers) -> bool:
        given = [
            _authorization_key(headers.get("authorization", "")),
            headers.get("x-api-key", "").encode("latin-1"),
        ]
        # No early exit: the time must not tell which key was nearly right.
        matches = [hmac.compare_digest(key, candidate) for key in self._keys for candidate in given]
        return any(matches)


def _authorization_key(value: str) -> bytes:
    scheme, _, credentials = value.partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return credentials.encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
