"""The routes of `/v1/responses`: create, get, cancel, delete."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from stepflash.assistant.session import new_request_id
from stepflash.assistant.stream import StreamItem
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError, StepflashError
from stepflash.server.direct_route import add_direct_route
from stepflash.server.openai_responses_decode import ResponsesBody, ResponsesRequest, decode
from stepflash.server.openai_responses_encode import ResponseEncoder, ResponseHead
from stepflash.server.openai_responses_items import listed_items
from stepflash.server.openai_responses_store import ResponseStore, StoredResponse, not_found
from stepflash.server.request_records import current_record
from stepflash.server.service import Service
from stepflash.server.sse import KeepAlive, frame

# Codex gives up after its idle time whatever comments come; only events count for it.
KEEP_ALIVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Running:
    """A response that is being written."""

    encoder: ResponseEncoder
    engine_request_id: str
    owner: str


class ResponsesRoutes:
    """Handlers over the shared service; finished responses are kept in `store`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.session = service.session
        self.store = ResponseStore()
        self._running: dict[str, _Running] = {}

    def add_to(self, app: FastAPI) -> None:
        one = "/v1/responses/{response_id}"
        add_direct_route(app, "/v1/responses", self.create)
        app.add_api_route(one, self.get, methods=["GET"], response_model=None)
        app.add_api_route(one, self.delete, methods=["DELETE"], response_model=None)
        app.add_api_route(f"{one}/cancel", self.cancel, methods=["POST"], response_model=None)
        app.add_api_route(f"{one}/input_items", self.input_items, methods=["GET"], response_model=None)

    async def create(self, request: Request) -> Response:
        previous: StoredResponse | None = None

        def decoded(body: ResponsesBody, defaults: SamplingParams) -> ResponsesRequest:
            nonlocal previous
            previous = self._previous(body.previous_response_id)
            return decode(body, defaults, previous.next_items if previous else ())

        body, prompt = await self.service.open(request, ResponsesBody, decoded)
        (stream,) = self.service.answers([prompt], body.scheduling)
        head = ResponseHead(
            id=f"resp_{new_request_id()}",
            created_at=int(time.time()),
            model=self.service.model_name,
            toolbox=body.toolbox,
            seals_thoughts=body.seals_thoughts,
            echo=body.echo,
        )
        encoder = ResponseEncoder(head, self.session.tokenizer.token_bytes)
        running = _Running(encoder, prompt.request.request_id, self._owner())
        num_bytes = current_record().num_body_bytes + (previous.num_bytes if previous else 0)
        batches = self._batches(head.id, running, stream, body, num_bytes)
        if body.stream:

            def keep_alive() -> bytes:
                return _frame(running.encoder.keep_alive())

            def error_frame(error: StepflashError) -> bytes:
                return _frame(running.encoder.fail(error))

            return self.service.event_stream(
                request, _frames(batches), error_frame, keep_alive=KeepAlive(KEEP_ALIVE_SECONDS, keep_alive)
            )
        return JSONResponse(await self.service.unless_gone(request, _last_response(batches)))

    async def get(self, request: Request, response_id: str) -> Response:
        if request.query_params.get("stream") == "true":
            raise RequestError(
                "stream: a stored response comes whole", param="stream", code="unsupported_parameter"
            )
        if (running := self._running_one(response_id)) is not None:
            return JSONResponse(running.encoder.response("in_progress"))
        return JSONResponse(self._stored(response_id).response)

    async def delete(self, response_id: str) -> Response:
        self.store.delete(response_id, self._owner())
        return JSONResponse({"id": response_id, "object": "response.deleted", "deleted": True})

    async def cancel(self, response_id: str) -> Response:
        """Ends a running response; its stream ends with what there is. To do it again is no mistake."""
        running = self._running_one(response_id)
        if running is None:
            response = self._stored(response_id).response
            status = response["status"]
            if status == "cancelled":
                return JSONResponse(response)
            raise RequestError(f"the response cannot be cancelled: it is {status}", param="response_id")
        self.session.engine.abort(running.engine_request_id)
        return JSONResponse(running.encoder.response("cancelled"))

    async def input_items(self, request: Request, response_id: str) -> Response:
        return JSONResponse(listed_items(self._stored(response_id).items, request.query_params))

    async def _batches(
        self,
        response_id: str,
        running: _Running,
        stream: AsyncGenerator[list[StreamItem]],
        body: ResponsesRequest,
        num_bytes: int,
    ) -> AsyncGenerator[list[dict[str, Any]]]:
        """Events, those that came together in one list."""
        self._running[response_id] = running
        try:
            async with aclosing(stream):
                yield list(running.encoder.start())
                async for batch in stream:
                    events = [event for item in batch for event in running.encoder.encode(item)]
                    for event in events:
                        if body.is_stored and event["type"] in ("response.completed", "response.incomplete"):
                            self._keep(event["response"], body.items, num_bytes, running.owner)
                    yield events
        finally:
            del self._running[response_id]

    def _keep(self, response: dict[str, Any], items: tuple[Any, ...], num_bytes: int, owner: str) -> None:
        num_bytes += len(json.dumps(response))
        self.store.put(StoredResponse(response=response, items=items, num_bytes=num_bytes, owner=owner))

    def _owner(self) -> str:
        """Who asks, by key: nobody reads, continues or ends the responses of another key."""
        return current_record().client if self.service.settings.api_keys else ""

    def _running_one(self, response_id: str) -> _Running | None:
        running = self._running.get(response_id)
        return running if running is not None and running.owner == self._owner() else None

    def _stored(self, response_id: str) -> StoredResponse:
        stored = self.store.get(response_id, self._owner())
        if stored is None:
            raise not_found(response_id)
        return stored

    def _previous(self, response_id: str | None) -> StoredResponse | None:
        if response_id is None:
            return None
        stored = self.store.get(response_id, self._owner())
        if stored is None:
            raise RequestError(
                f"previous response {response_id!r} not found; the server keeps a limited number, "
                "and none with store false",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return stored


async def _frames(batches: AsyncGenerator[list[dict[str, Any]]]) -> AsyncGenerator[bytes]:
    async with aclosing(batches):
        async for batch in batches:
            if batch:
                yield b"".join([_frame(event) for event in batch])


async def _last_response(batches: AsyncGenerator[list[dict[str, Any]]]) -> dict[str, Any]:
    response: dict[str, Any] = {}
    async with aclosing(batches):
        async for batch in batches:
            for event in batch:
                response = event.get("response", response)
    return response


def _frame(event: dict[str, Any]) -> bytes:
    return frame(event, event["type"])
