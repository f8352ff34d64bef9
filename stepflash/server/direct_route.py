"""Routes on which every answer begins: their handlers take the request and give the response.

They read and check the body themselves, so there is nothing that FastAPI could solve, validate or encode for them.
The OpenAPI description has them like all others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute


class DirectRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def add_direct_route(app: FastAPI, path: str, handler: Callable[[Request], Awaitable[Response]]) -> None:
    app.router.add_api_route(
        path, handler, methods=["POST"], response_model=None, route_class_override=DirectRoute
    )
