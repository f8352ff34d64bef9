"""Calls an application in this process over ASGI, and reads what streams send as a client would."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from stepflash.assistant.session import Session
from stepflash.server.app import create_app
from stepflash.settings import ServerSettings


class Client:
    """Calls an application in this process; every request is a connection of its own."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def get(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._request("GET", path, **options))

    def post(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._request("POST", path, **options))

    def delete(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._request("DELETE", path, **options))

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self._app)
        async with (
            self._app.router.lifespan_context(self._app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            return await client.request(method, path, **options)


def client_of(session: Session, **options: Any) -> Client:
    return Client(create_app(session, "scripted", settings=ServerSettings(**options)))


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream whose frames are an `event:` line and a `data:` line of the same type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events
