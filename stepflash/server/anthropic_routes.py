"""The routes of the Anthropic API: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from stepflash.assistant.session import new_request_id
from stepflash.assistant.stream import StreamItem
from stepflash.errors import StepflashError
from stepflash.server.anthropic_decode import CountTokensBody, MessagesBody, decode
from stepflash.server.anthropic_encode import PING, MessageEncoder, MessageHead, fold_message
from stepflash.server.anthropic_errors import describe
from stepflash.server.direct_route import add_direct_route
from stepflash.server.request_records import current_record
from stepflash.server.service import Service
from stepflash.server.sse import KeepAlive, frame

PINGS = KeepAlive(10.0, lambda: frame(PING, "ping"))


class AnthropicRoutes:
    """Handlers over the shared service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.session = service.session

    def add_to(self, app: FastAPI) -> None:
        add_direct_route(app, "/v1/messages", self.messages)
        app.add_api_route(
            "/v1/messages/count_tokens", self.count_tokens, methods=["POST"], response_model=None
        )

    async def messages(self, request: Request) -> Response:
        body, prompt = await self.service.open(request, MessagesBody, decode)
        (stream,) = self.service.answers([prompt], body.scheduling)
        max_tokens = prompt.request.sampling.max_tokens
        head = MessageHead(
            id=f"msg_{new_request_id()}",
            model=self.service.model_name,
            num_prompt_tokens=len(prompt.request.prompt_token_ids),
            shows_thinking=body.shows_thinking,
            is_context_limit=max_tokens is not None and max_tokens < body.max_tokens,
        )
        batches = _batches(MessageEncoder(head), stream)
        if body.stream:
            return self.service.event_stream(request, _frames(batches), _error_frame, keep_alive=PINGS)
        return JSONResponse(await self.service.unless_gone(request, _whole(batches)))

    async def count_tokens(self, request: Request) -> Response:
        """Renders and encodes; the engine is not asked, so a full queue does not matter."""
        body = await self.service.read(request, CountTokensBody)
        self.service.check_model(body.model)
        asked = await self.service.prepared(lambda: decode(body, self.service.defaults))

        def count() -> int:
            return self.session.num_prompt_tokens(
                self.service.canonical(asked.conversation),
                prefill=asked.prefill,
                template_variables=asked.template_variables,
                thinking=self.service.thinking(asked.thinking),
            )

        return JSONResponse({"input_tokens": await self.service.prepared(count)})


async def _batches(
    encoder: MessageEncoder, stream: AsyncGenerator[list[StreamItem]]
) -> AsyncGenerator[list[dict[str, Any]]]:
    """Events, those that came together in one list."""
    async with aclosing(stream):
        yield list(encoder.start())
        async for batch in stream:
            yield [event for item in batch for event in encoder.encode(item)]


async def _frames(batches: AsyncGenerator[list[dict[str, Any]]]) -> AsyncGenerator[bytes]:
    async with aclosing(batches):
        async for batch in batches:
            if batch:
                yield b"".join([frame(event, event["type"]) for event in batch])


async def _whole(batches: AsyncGenerator[list[dict[str, Any]]]) -> dict[str, Any]:
    async with aclosing(batches):
        return fold_message([event async for batch in batches for event in batch])


def _error_frame(error: StepflashError) -> bytes:
    return frame(describe(error, current_record().request_id)[1], "error")
