"""API keys: every route but the health check is closed to whoever has none.

Accepted are `Authorization: Bearer KEY`, `x-api-key: KEY` and, for browsers opening the page, HTTP basic
authentication with the key as password. Comparing takes the same time whether or not a key is right. A key has
a name, by which logs and limits call whoever uses it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stepflash.errors import ConfigError
from stepflash.server.errors_by_path import message_response
from stepflash.server.request_records import current_record

OPEN_PATHS = frozenset({"/health"})


def read_key_file(file: str | Path) -> tuple[str, ...]:
    """The keys of a file: one a line, optionally a name after it; empty lines and `#` comments are skipped.

    Raises:
        ConfigError: it cannot be read, or holds no key.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{file}: the API keys cannot be read: {reason}") from None
    keys = tuple(text for line in lines if (text := line.strip()) and not text.startswith("#"))
    if not keys:
        raise ConfigError(f"{file}: there is no API key in it; one a line is expected")
    for number, key in enumerate(keys, 1):
        if len(key.split()) > 2:
            raise ConfigError(f"{file}: key number {number} is followed by more than one name")
    return keys


class KeyGuard:
    """ASGI middleware that answers 401 to requests without one of `keys` ("KEY" or "KEY NAME"); no keys, no
    guard. Keys themselves are not kept, only their digests."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._names = dict(_named(key) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._names or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        name = self._name_of(Headers(scope=scope))
        if name is not None:
            current_record().client = name
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        is_page = path == "/" or path.startswith("/page/")
        response = message_response(
            path,
            401,
            "a valid API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            current_record().request_id,
            code="invalid_api_key",
            headers={"www-authenticate": f'{"Basic" if is_page else "Bearer"} realm="stepflash"'},
        )
        await response(scope, receive, send)

    def _name_of(self, headers: Headers) -> str | None:
        """The name of the key that was sent, None without a right one."""
        given = [
            _digest(_authorization_key(headers.get("authorization", ""))),
            _digest(headers.get("x-api-key", "").encode("latin-1")),
        ]
        # Digests have one length, and there is no early exit: the time must not tell which key was nearly right.
        matches = [
            name
            for digest, name in self._names.items()
            for candidate in given
            if hmac.compare_digest(digest, candidate)
        ]
        return matches[0] if matches else None


def _named(key: str) -> tuple[bytes, str]:
    secret, _, name = key.partition(" ")
    digest = _digest(secret.encode())
    return digest, name.strip() or f"key-{digest.hex()[:8]}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


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
