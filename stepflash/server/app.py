"""The HTTP application: routes, and nothing that a route does not need.

A handler reads the body, decodes it with a pure function, runs the session and encodes what comes. Errors of
ours become the API's error body in one place. Whatever else escapes is logged and answered with 500; the
process goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from stepflash.assistant.reader import Prompt
from stepflash.assistant.session import Session, as_choice, new_request_id
from stepflash.assistant.stream import Answer, Fold, Progress, StreamItem, Usage, fold, merge, total_usage
from stepflash.engine.request import SamplingParams
from stepflash.errors import EngineError, RequestError, StepflashError
from stepflash.server import openai_chat_decode, openai_chat_encode, openai_completions
from stepflash.server.keys import KeyGuard
from stepflash.server.metrics import Metrics
from stepflash.server.openai_chat_encode import ResponseHead
from stepflash.server.openai_errors import describe, error_json, error_response
from stepflash.server.openai_schema import ChatBody, CompletionBody, read_body
from stepflash.server.sse import DONE, ClientGone, EventStream, frame, unless_disconnected
from stepflash.settings import ServerSettings

PAGE_FOLDER = Path(__file__).parent / "page"
HEALTH_SECONDS, RECENT_SECONDS = 30.0, 2.0
LARGE_BODY_BYTES = 32_768  # from here on, templates and tokenising leave the event loop
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
DEFAULT_SAMPLING = SamplingParams(max_tokens=None)

log = logging.getLogger("stepflash.server")
T = TypeVar("T")


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
    return _Server(session, model_name, settings or ServerSettings(), defaults).app


class _Server:
    """The handlers and what they share."""

    def __init__(
        self, session: Session, model_name: str, settings: ServerSettings, defaults: SamplingParams
    ) -> None:
        self.session = session
        self.model_name = model_name
        self.settings = settings
        self.defaults = defaults
        self.metrics = Metrics()
        self.created = int(time.time())
        self.app = self._build()

    def _build(self) -> FastAPI:
        app = FastAPI(title="stepflash", docs_url=None, redoc_url=None)
        app.add_api_route(
            "/v1/chat/completions", self.chat_completions, methods=["POST"], response_model=None
        )
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self.metrics_text, methods=["GET"], response_class=PlainTextResponse)
        app.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/page/{name}", self.page, methods=["GET"], include_in_schema=False)
        app.add_exception_handler(StepflashError, self.on_error)
        app.add_exception_handler(HTTPException, self.on_http_error)
        app.add_exception_handler(ClientGone, self.on_client_gone)
        app.add_exception_handler(Exception, self.on_bug)
        app.add_middleware(KeyGuard, keys=self.settings.api_keys)
        return app

    # Routes

    async def chat_completions(self, request: Request) -> Response:
        raw = await self._read(request)
        body = openai_chat_decode.decode(read_body(raw, ChatBody), self.defaults)
        self._check_model(body.model)

        def prepare() -> Prompt:
            return self.session.prepare(
                body.conversation,
                body.sampling,
                prefill=body.prefill,
                max_tool_calls=body.max_tool_calls,
                template_variables=body.template_variables,
            )

        prompt = await _prepared(prepare, len(raw))
        streams = self._answers([as_choice(prompt, index) for index in range(body.num_choices)])
        head = self._head("chatcmpl-")
        if body.stream:
            chunks = openai_chat_encode.chunks(head, merge(streams), body, self.session.tokenizer.token_bytes)
            return self._event_stream(request, chunks)
        answers = await self._whole_answers(request, streams)
        self._count(request, 200)
        return JSONResponse(openai_chat_encode.response(head, answers, self.session.tokenizer.token_bytes))

    async def completions(self, request: Request) -> Response:
        raw = await self._read(request)
        body = openai_completions.decode(read_body(raw, CompletionBody), self.defaults)
        self._check_model(body.model)

        def prepare() -> list[Prompt]:
            return [self.session.prepare_text(prompt, body.sampling) for prompt in body.prompts]

        prompts = await _prepared(prepare, len(raw))
        streams = self._answers(
            [as_choice(prompt, index) for prompt in prompts for index in range(body.num_choices)]
        )
        echoed = [self._echo(prompt, body.echo) for prompt in body.prompts for _ in range(body.num_choices)]
        head = self._head("cmpl-")
        token_bytes = self.session.tokenizer.token_bytes
        if body.stream:
            chunks = openai_completions.chunks(head, merge(streams), echoed, body, token_bytes)
            return self._event_stream(request, chunks)
        answers = await self._whole_answers(request, streams)
        choices = [
            openai_completions.answer_choice(index, answer, echo, token_bytes)
            for index, (answer, echo) in enumerate(zip(answers, echoed, strict=True))
        ]
        usage = total_usage([answer.usage for answer in answers], body.num_choices)
        self._count(request, 200)
        return JSONResponse(openai_completions.response(head, choices, usage))

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_json()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model_json()

    async def health(self) -> Response:
        """Generates a token: an engine that cannot is not healthy, whatever its process says.

        While others get tokens that is proof enough, so that a full queue does not look like a failure.
        """
        started = time.monotonic()
        if started - self.metrics.last_token_at < RECENT_SECONDS:
            return JSONResponse({"status": "ok", "model": self.model_name, "seconds": 0.0})
        first_token = self.session.tokenizer.bos_token_id or 0
        sampling = SamplingParams(max_tokens=1, temperature=0.0, draft_depth=0, ignore_eos=True)
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await fold(self.session.answer(self.session.prepare_text([first_token], sampling)))
        except TimeoutError:
            return JSONResponse({"status": "no token within 30 seconds"}, 503)
        except StepflashError as error:
            return JSONResponse({"status": str(error)}, 503)
        return JSONResponse(
            {"status": "ok", "model": self.model_name, "seconds": round(time.monotonic() - started, 4)}
        )

    async def metrics_text(self) -> str:
        return self.metrics.render(self.session.engine.stats())

    async def page(self, name: str = "index.html") -> Response:
        file = PAGE_FOLDER / name
        if file.parent != PAGE_FOLDER or not file.is_file():
            raise HTTPException(404)
        return FileResponse(file, headers=PAGE_HEADERS)

    # Running answers

    def _answers(self, prompts: Sequence[Prompt]) -> list[AsyncGenerator[StreamItem]]:
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

    async def _whole_answers(
        self, request: Request, streams: Sequence[AsyncGenerator[StreamItem]]
    ) -> list[Answer]:
        async def collect() -> list[Answer]:
            folds = [Fold() for _ in streams]
            async with aclosing(merge(streams)) as items:
                async for index, item in items:
                    folds[index].add(item)
            return [collected.answer() for collected in folds]

        return await unless_disconnected(request.receive, collect())

    def _event_stream(self, request: Request, chunks: AsyncGenerator[dict[str, Any]]) -> EventStream:
        async def frames() -> AsyncGenerator[bytes]:
            status = 499  # what is counted when the client leaves
            try:
                async with aclosing(chunks):
                    async for chunk in chunks:
                        yield frame(chunk)
                status = 200
            except StepflashError as error:
                status, body, _ = describe(error)
                yield frame(body)
            except Exception:  # a bug of ours: the head is sent, so the client is told in the stream
                log.exception("%s %s failed in its stream", request.method, request.url.path)
                status = 500
                yield frame(error_json("internal error", type="server_error"))
            finally:
                self._count(request, status)
            yield DONE

        return EventStream(frames())

    # Errors

    async def on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, StepflashError)
        response = error_response(error)
        if isinstance(error, EngineError):
            log.error("%s %s: %s", request.method, request.url.path, error)
        self._count(request, response.status_code)
        return response

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return JSONResponse(error_json(message), error.status_code, headers=error.headers)

    async def on_client_gone(self, request: Request, error: Exception) -> Response:
        self._count(request, 499)
        return Response(status_code=499)

    async def on_bug(self, request: Request, error: Exception) -> Response:
        """Any other exception is a bug of ours. The request fails alone; the traceback is in the log."""
        self._count(request, 500)
        return JSONResponse(error_json("internal error", type="server_error"), 500)

    # Small things

    async def _read(self, request: Request) -> bytes:
        limit = self.settings.max_body_bytes
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if len(raw) > limit:
                raise HTTPException(413, f"the body is larger than {limit} bytes")
        return bytes(raw)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _head(self, prefix: str) -> ResponseHead:
        return ResponseHead(id=prefix + new_request_id(), created=int(time.time()), model=self.model_name)

    def _model_json(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "stepflash",
            "max_model_len": self.session.max_context_tokens,
        }

    def _echo(self, prompt: str | tuple[int, ...], echo: bool) -> str:
        if not echo:
            return ""
        return prompt if isinstance(prompt, str) else self.session.tokenizer.decode(prompt)

    def _count(self, request: Request, status: int) -> None:
        # By route, not by path: whoever asks for many paths must not create many counters.
        route = request.scope.get("route")
        self.metrics.count_request(getattr(route, "path", "other"), status)


async def _prepared(prepare: Callable[[], T], num_bytes: int) -> T:
    """Render and encode: short prompts here, long ones in a thread, so that other streams go on."""
    return prepare() if num_bytes < LARGE_BODY_BYTES else await asyncio.to_thread(prepare)
