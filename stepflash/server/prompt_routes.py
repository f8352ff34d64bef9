"""Routes that show prompts without running them: `/tokenize`, `/detokenize`, `/apply-template`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from stepflash.chat.messages import Conversation
from stepflash.chat.openai_messages import messages_from_openai, tools_from_openai
from stepflash.errors import RequestError
from stepflash.server.body import Body
from stepflash.server.service import Service


class PromptBody(Body):
    """A text, or a conversation to render."""

    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    with_pieces: bool | None = None


class TokensBody(Body):
    """Token ids to turn into text."""

    tokens: list[int]


class PromptRoutes:
    """Handlers over the shared service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.session = service.session

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"], response_model=None)
        app.add_api_route("/detokenize", self.detokenize, methods=["POST"], response_model=None)
        app.add_api_route("/apply-template", self.apply_template, methods=["POST"], response_model=None)

    async def tokenize(self, request: Request) -> Response:
        body = await self.service.read(request, PromptBody)
        tokenizer = self.session.tokenizer

        def encode() -> list[int]:
            return tokenizer.encode(self._text(body) if body.content is None else body.content)

        token_ids = await self.service.prepared(encode)
        tokens: list[Any] = list(token_ids)
        if body.with_pieces:
            tokens = [{"id": token_id, "piece": tokenizer.decode([token_id])} for token_id in token_ids]
        return JSONResponse(
            {
                "tokens": tokens,
                "count": len(tokens),
                "max_model_len": self.session.max_context_tokens,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self.service.read(request, TokensBody)
        size = self.session.tokenizer.vocab_size
        wrong = next((token_id for token_id in body.tokens if not 0 <= token_id < size), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is outside the vocabulary (0 to {size - 1})", param="tokens"
            )
        return JSONResponse({"content": self.session.tokenizer.decode(body.tokens)})

    async def apply_template(self, request: Request) -> Response:
        body = await self.service.read(request, PromptBody)
        return JSONResponse({"prompt": await self.service.prepared(lambda: self._text(body))})

    def _text(self, body: PromptBody) -> str:
        """The prompt of a conversation, as the chat route renders it."""
        conversation = conversation_of(body, self.service)
        rendered = self.session.template.render(
            conversation.messages, tools=conversation.tools, variables=body.chat_template_kwargs
        )
        return rendered.text


def conversation_of(body: PromptBody, service: Service) -> Conversation:
    """The conversation of a body, as the chat route has it.

    Raises:
        RequestError: it has no messages, or wrong ones.
    """
    if not body.messages:
        raise RequestError("messages must hold at least one message", param="messages")
    return service.canonical(
        Conversation(messages=messages_from_openai(body.messages), tools=tools_from_openai(body.tools or ()))
    )
