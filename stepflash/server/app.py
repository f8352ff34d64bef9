"""The HTTP application: the routes of the APIs, the page, health and metrics, and what becomes of errors.

A handler reads the body, decodes it with a pure function, runs the session and encodes what comes. Errors of
ours become the API's error body in one place. Whatever else escapes is logged and answered with 500; the
process goes on.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from stepflash.assistant.session import Session
from stepflash.assistant.stream import fold
from stepflash.engine.request import SamplingParams
from stepflash.errors import EngineError, StepflashError
from stepflash.server.anthropic_routes import AnthropicRoutes
from stepflash.server.errors_by_path import error_response, message_response
from stepflash.server.keys import KeyGuard
from stepflash.server.openai_responses_routes import ResponsesRoutes
from stepflash.server.openai_routes import OpenAIRoutes
from stepflash.server.prompt_routes import PromptRoutes
from stepflash.server.request_ids import RequestIds
from stepflash.server.service import CLIENT_GONE, Service, log
from stepflash.server.sse import ClientGone
from stepflash.settings import ServerSettings

PAGE_FOLDER = Path(__file__).parent / "page"
HEALTH_SECONDS, RECENT_SECONDS = 30.0, 2.0
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
) -> FastAPI:
    """The application that serves one session under one model name.

    `defaults` are the sampling parameters of a request that names none. The engine must be running.
    """
    service = Service(session, model_name, settings or ServerSettings(), defaults)
    app = FastAPI(title="stepflash", docs_url=None, redoc_url=None)
    OpenAIRoutes(service).add_to(app)
    ResponsesRoutes(service).add_to(app)
    AnthropicRoutes(service).add_to(app)
    PromptRoutes(service).add_to(app)
    _Operations(service).add_to(app)
    app.add_middleware(KeyGuard, keys=service.settings.api_keys)
    app.add_middleware(RequestIds)
    return app


class _Operations:
    """Page, health, metrics, errors."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.session = service.session

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self.metrics_text, methods=["GET"], response_class=PlainTextResponse)
        app.add_api_route("/", self.page, methods=["GET", "HEAD"], include_in_schema=False)
        app.add_api_route("/page/{name}", self.page, methods=["GET"], include_in_schema=False)
        app.add_exception_handler(StepflashError, self.on_error)
        app.add_exception_handler(HTTPException, self.on_http_error)
        app.add_exception_handler(ClientGone, self.on_client_gone)
        app.add_exception_handler(Exception, self.on_bug)

    async def health(self) -> Response:
        """Generates a token: an engine that cannot is not healthy, whatever its process says.

        While others get tokens that is proof enough, so that a full queue does not look like a failure.
        """
        model = self.service.model_name
        started = time.monotonic()
        if started - self.service.metrics.last_token_at < RECENT_SECONDS:
            return JSONResponse({"status": "ok", "model": model, "seconds": 0.0})
        first_token = self.session.tokenizer.bos_token_id or 0
        sampling = SamplingParams(max_tokens=1, temperature=0.0, draft_depth=0, ignore_eos=True)
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await fold(self.session.answer(self.session.prepare_text([first_token], sampling)))
        except TimeoutError:
            return JSONResponse({"status": "no token within 30 seconds"}, 503)
        except StepflashError as error:
            return JSONResponse({"status": str(error)}, 503)
        return JSONResponse({"status": "ok", "model": model, "seconds": round(time.monotonic() - started, 4)})

    async def metrics_text(self) -> str:
        return self.service.metrics.render(self.session.engine.stats())

    async def page(self, name: str = "index.html") -> Response:
        file = PAGE_FOLDER / name
        if file.parent != PAGE_FOLDER or not file.is_file():
            raise HTTPException(404)
        return FileResponse(file, headers=PAGE_HEADERS)

    async def on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, StepflashError)
        response = error_response(request.url.path, error)
        if isinstance(error, EngineError):
            log.error("%s %s: %s", request.method, request.url.path, error)
        self.service.count(request, response.status_code)
        return response

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        messages = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}
        message = messages.get(error.status_code, str(error.detail))
        return message_response(path, error.status_code, message, headers=error.headers)

    async def on_client_gone(self, request: Request, error: Exception) -> Response:
        self.service.count(request, CLIENT_GONE)
        return Response(status_code=CLIENT_GONE)

    async def on_bug(self, request: Request, error: Exception) -> Response:
        """Any other exception is a bug of ours. The request fails alone; the traceback is in the log."""
        self.service.count(request, 500)
        return message_response(request.url.path, 500, "internal error")
