"""`/cache/explain`: how much of a prompt came from the cache, and where and why the rest did not."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from stepflash.assistant.reader import Prompt
from stepflash.errors import RequestError
from stepflash.server.cache_ledger import CacheReport, explain
from stepflash.server.errors_by_path import message_response
from stepflash.server.prompt_routes import PromptBody, conversation_of, text_of
from stepflash.server.request_records import current_record
from stepflash.server.service import Service

MAX_SHOWN = 100


class CacheRoutes:
    """Handlers over the shared service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.session = service.session

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/cache/explain", self.of_latest, methods=["GET"], response_model=None)
        app.add_api_route("/cache/explain", self.of_prompt, methods=["POST"], response_model=None)

    async def of_latest(self, request: Request) -> Response:
        """The latest requests of whoever asks, newest first; with `?request_id=` that one, with `?limit=` so many."""
        request_id, limit = request.query_params.get("request_id"), _limit(request)
        record = current_record()
        reports = list(self.service.cache_ledger.latest(record.client, request_id))
        if request_id is not None and not reports:
            message = f"no request {request_id[:80]!r} of yours is remembered"
            return message_response(
                request.url.path, 404, message, record.request_id, code="request_not_found"
            )
        return JSONResponse({"requests": [self._explained(report) for report in reports[:limit]]})

    async def of_prompt(self, request: Request) -> Response:
        """What would come from the cache if this were sent now. Nothing is computed."""
        body = await self.service.read(request, PromptBody)
        prompt = await self.service.prepared(lambda: self._prompt(body))
        record = current_record()
        report = self.service.cache_ledger.compare(
            record.request_id, record.client, prompt.request.prompt_token_ids, self.session.lookup(prompt)
        )
        return JSONResponse(self._explained(report))

    def _prompt(self, body: PromptBody) -> Prompt:
        if (text := text_of(body)) is not None:
            return self.session.prepare_text(text, self.service.defaults)
        return self.session.prepare(
            conversation_of(body, self.service),
            self.service.defaults,
            template_variables=body.chat_template_kwargs,
        )

    def _explained(self, report: CacheReport) -> dict[str, Any]:
        return explain(report, self.session.tokenizer.decode)


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", "10")
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_SHOWN:
        raise RequestError(f"limit must be between 1 and {MAX_SHOWN}, got {text[:80]!r}", param="limit")
    return int(text)
