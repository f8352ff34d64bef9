"""The HTTP application: the routes of the APIs, the page, health and metrics, and what becomes of errors.

A handler reads the body, decodes it with a pure function, runs the session and encodes what comes. Errors of
ours become the API's error body in one place. Whatever else escapes is logged and answered with 500; the
process goes on. Around the routes, from the outside in: the record of the request, which pages may ask, keys,
limits.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException

from stepflash.assistant.session import Session
from stepflash.engine.request import SamplingParams
from stepflash.errors import EngineError, StepflashError
from stepflash.server.anthropic_routes import AnthropicRoutes
from stepflash.server.cache_routes import CacheRoutes
from stepflash.server.closing import Closing
from stepflash.server.errors_by_path import error_response, message_response
from stepflash.server.keys import KeyGuard
from stepflash.server.limits import ClientLimits
from stepflash.server.logs import log_request
from stepflash.server.openai_responses_routes import ResponsesRoutes
from stepflash.server.openai_routes import OpenAIRoutes
from stepflash.server.openapi import describe_bodies
from stepflash.server.origins import OriginGuard
from stepflash.server.prompt_routes import PromptRoutes
from stepflash.server.request_records import CLIENT_GONE, RequestRecord, RequestRecords, current_record, log
from stepflash.server.service import Service
from stepflash.server.sse import ClientGone
from stepflash.settings import ServerSettings

PAGE_FOLDER = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
DEFAULT_SAMPLING = SamplingParams(max_tokens=None)


def create_app(
    session: Session,
    model_name: str,
    *,
    settings: ServerSettings | None = None,
    defaults: SamplingParams = DEFAULT_SAMPLING,
    on_closed: Sequence[Callable[[RequestRecord], None]] = (),
) -> FastAPI:
    """The application that serves one session under one model name.

    `defaults` are the sampling parameters of a request that names none. `on_closed` is told of every request that
    has ended. The engine must be running. `app.state.closing` ends the answers that run when the server's time is
    over.
    """
    settings = settings or ServerSettings()
    closing = Closing()
    service = Service(session, model_name, settings, defaults, closing)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await session.aclose()

    app = FastAPI(title="stepflash", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.closing = closing
    OpenAIRoutes(service).add_to(app)
    ResponsesRoutes(service).add_to(app)
    AnthropicRoutes(service).add_to(app)
    PromptRoutes(service).add_to(app)
    CacheRoutes(service).add_to(app)
    _Operations(service).add_to(app)
    describe_bodies(app)
    app.add_middleware(ClientLimits, settings=settings)
    app.add_middleware(KeyGuard, keys=settings.api_keys)
    app.add_middleware(OriginGuard, origins=settings.cors_origins, has_keys=bool(settings.api_keys))
    closed = (
        service.open_answers.give_back,
        service.close_reports,
        service.metrics.count,
        log_request,
        *on_closed,
    )
    app.add_middleware(RequestRecords, closed=closed)
    return app


class _Operations:
    """Page, health, metrics, errors."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.session = service.session

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/health", self.health, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/metrics", self.metrics_text, methods=["GET"], response_model=None)
        app.add_api_route("/", self.page, methods=["GET", "HEAD"], include_in_schema=False)
        app.add_api_route("/page/{name}", self.page, methods=["GET"], include_in_schema=False)
        app.add_exception_handler(StepflashError, self.on_error)
        app.add_exception_handler(HTTPException, self.on_http_error)
        app.add_exception_handler(ClientGone, self.on_client_gone)

    async def health(self) -> Response:
        """Generates a token: an engine that cannot is not healthy, whatever its process says."""
        health = await self.service.health.check()
        body = {"status": health.status, "model": self.service.model_name, "seconds": health.seconds}
        return JSONResponse(body, 200 if health.is_ok else 503)

    async def metrics_text(self) -> Response:
        return Response(self.service.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def page(self, name: str = "index.html") -> Response:
        file = PAGE_FOLDER / name
        if file.parent != PAGE_FOLDER or not file.is_file():
            raise HTTPException(404)
        return FileResponse(file, headers=PAGE_HEADERS)

    async def on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, StepflashError)
        response = error_response(request.url.path, error, current_record().request_id)
        if isinstance(error, EngineError):
            log.error("%s %s: %s", request.method, request.url.path, error)
        return response

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        messages = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}
        message = messages.get(error.status_code, str(error.detail))
        request_id = current_record().request_id
        return message_response(path, error.status_code, message, request_id, headers=error.headers)

    async def on_client_gone(self, request: Request, error: Exception) -> Response:
        current_record().outcome = CLIENT_GONE
        return Response(status_code=CLIENT_GONE)
