"""The routes of OpenAI's chat and text completions and of the list of models."""

from __future__ import annotations

import datetime
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from stepflash.assistant.reader import Prompt
from stepflash.assistant.session import as_choice, new_request_id
from stepflash.assistant.stream import Answer, Fold, StreamItem, merge, total_usage
from stepflash.errors import StepflashError
from stepflash.server import openai_chat_decode, openai_chat_encode, openai_completions
from stepflash.server.direct_route import add_direct_route
from stepflash.server.openai_chat_encode import ResponseHead
from stepflash.server.openai_completions import CompletionRequest, Echo
from stepflash.server.openai_errors import describe
from stepflash.server.openai_schema import ChatBody, CompletionBody
from stepflash.server.service import Service
from stepflash.server.sse import DONE, EventStream, frame
from stepflash.settings import REASONING_FIELDS


class OpenAIRoutes:
    """`/v1/chat/completions`, `/v1/completions`, `/v1/models`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.session = service.session

    def add_to(self, app: FastAPI) -> None:
        add_direct_route(app, "/v1/chat/completions", self.chat_completions)
        add_direct_route(app, "/v1/completions", self.completions)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])

    async def chat_completions(self, request: Request) -> Response:
        body, prompt = await self.service.open(request, ChatBody, openai_chat_decode.decode)
        choices = [as_choice(prompt, index) for index in range(body.num_choices)]
        streams = self.service.answers(choices, body.scheduling)
        head = self._head("chatcmpl-")
        if body.stream:
            frames = openai_chat_encode.frames(head, merge(streams), body, self.session.tokenizer.token_bytes)
            return self._event_stream(request, frames)
        answers = await self.service.unless_gone(request, _whole(streams))
        return JSONResponse(openai_chat_encode.response(head, answers, self.session.tokenizer.token_bytes))

    async def completions(self, request: Request) -> Response:
        read = await self.service.read(request, CompletionBody)
        self.service.check_model(read.model)
        body = openai_completions.decode(read, self.service.defaults)

        def prepare() -> list[Prompt]:
            return [
                self.session.prepare_text(prompt, body.sampling, body.answer_format)
                for prompt in body.prompts
            ]

        has_grammar = body.answer_format is not None
        prompts = await self.service.prepared(prepare, has_grammar=has_grammar)
        streams = self.service.answers(
            [as_choice(prompt, index) for prompt in prompts for index in range(body.num_choices)],
            body.scheduling,
        )
        echoes = [
            echo
            for text, prompt in zip(body.prompts, prompts, strict=True)
            for echo in [self._echo(text, prompt, body)] * body.num_choices
        ]
        head = self._head("cmpl-")
        token_bytes = self.session.tokenizer.token_bytes
        if body.stream:
            frames = openai_completions.frames(head, merge(streams), echoes, body, token_bytes)
            return self._event_stream(request, frames)
        answers = await self.service.unless_gone(request, _whole(streams))
        choices = [
            openai_completions.answer_choice(index, answer, echo, token_bytes)
            for index, (answer, echo) in enumerate(zip(answers, echoes, strict=True))
        ]
        usage = total_usage([answer.usage for answer in answers], body.num_choices)
        return JSONResponse(openai_completions.response(head, choices, usage))

    async def models(self) -> dict[str, Any]:
        model = self._model_json()
        # The fields behind `data` are Anthropic's, which lists models at the same path.
        return {
            "object": "list",
            "data": [model],
            "has_more": False,
            "first_id": model["id"],
            "last_id": model["id"],
        }

    async def model(self, name: str) -> dict[str, Any]:
        self.service.check_model(name)
        return self._model_json()

    def _event_stream(self, request: Request, frames: AsyncGenerator[bytes]) -> EventStream:
        def error_frame(error: StepflashError) -> bytes:
            return frame(describe(error)[1])

        return self.service.event_stream(request, frames, error_frame, last_frame=DONE)

    def _head(self, prefix: str) -> ResponseHead:
        return ResponseHead(
            id=prefix + new_request_id(),
            created=int(time.time()),
            model=self.service.model_name,
            reasoning_fields=REASONING_FIELDS[self.service.settings.reasoning_field],
        )

    def _model_json(self) -> dict[str, Any]:
        created_at = datetime.datetime.fromtimestamp(self.service.created, datetime.UTC)
        return {
            "id": self.service.model_name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "stepflash",
            "max_model_len": self.session.max_context_tokens,
            "type": "model",
            "display_name": self.service.model_name,
            "lifecycle": "active",
            "created_at": created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "max_input_tokens": self.session.max_context_tokens,
        }

    def _echo(self, given: str | tuple[int, ...], prompt: Prompt, body: CompletionRequest) -> Echo:
        if not body.echo:
            return Echo()
        tokenizer, token_ids = self.session.tokenizer, prompt.request.prompt_token_ids
        text = given if isinstance(given, str) else tokenizer.decode(given)
        # The bos token, unless the text begins with it.
        num_hidden = int(isinstance(given, str) and not text.startswith(tokenizer.decode(token_ids[:1])))
        is_told = body.sampling.logprobs is not None and len(token_ids) > num_hidden
        return Echo(text=text, first_token=token_ids[num_hidden] if is_told else None, num_hidden=num_hidden)


async def _whole(streams: Sequence[AsyncGenerator[list[StreamItem]]]) -> list[Answer]:
    folds = [Fold() for _ in streams]
    async with aclosing(merge(streams)) as batches:
        async for index, batch in batches:
            for item in batch:
                folds[index].add(item)
    return [collected.answer() for collected in folds]
