"""Routes that show prompts without running them: `/tokenize`, `/detokenize`, `/apply-template`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from stepflash.assistant.budget import NO_THOUGHT, Thinking
from stepflash.chat.messages import Conversation
from stepflash.chat.openai_messages import messages_from_openai, tools_from_openai
from stepflash.errors import RequestError
from stepflash.server.body import Body, Items, Refusal
from stepflash.server.service import Service
from stepflash.server.thinking_fields import turns_thinking_off

# Longer texts are refused by `/tokenize`: nobody can send them, and encoding takes memory.
MAX_CONTEXTS = 4


class PromptBody(Body):
    """A text, or a conversation to render; `prompt` is vLLM's name for `content`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "parse_special": Refusal("texts of special tokens are always special tokens", harmless=(True,)),
        "add_generation_prompt": Refusal("prompts end where the answer begins", harmless=(True,)),
        "chat_template": Refusal("the template is the model's own"),
        "return_token_strs": Refusal("use with_pieces"),
    }

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    messages: Items[dict[str, Any]] | None = None
    tools: Items[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    with_pieces: bool | None = None


class TokensBody(Body):
    """Token ids to turn into text."""

    model: str | None = None
    tokens: Items[int]


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
        self.service.check_model(body.model)
        tokenizer, text = self.session.tokenizer, text_of(body)

        def encode() -> list[int]:
            limit = MAX_CONTEXTS * self.session.max_context_tokens
            token_ids = tokenizer.encode(self._prompt(body) if text is None else text, limit=limit)
            bos, adds_bos = tokenizer.bos_token_id, body.add_special or body.add_special_tokens
            if text is None or not adds_bos or bos is None or token_ids[:1] == [bos]:
                return token_ids
            return [bos, *token_ids]

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
        self.service.check_model(body.model)
        size = self.session.tokenizer.vocab_size
        wrong = next((token_id for token_id in body.tokens if not 0 <= token_id < size), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is outside the vocabulary (0 to {size - 1})", param="tokens"
            )
        return JSONResponse({"content": self.session.tokenizer.decode(body.tokens)})

    async def apply_template(self, request: Request) -> Response:
        body = await self.service.read(request, PromptBody)
        self.service.check_model(body.model)
        return JSONResponse({"prompt": await self.service.prepared(lambda: self._prompt(body))})

    def _prompt(self, body: PromptBody) -> str:
        """The prompt of a conversation, as the chat route renders it."""
        variables = body.chat_template_kwargs or {}
        thinking = NO_THOUGHT if turns_thinking_off(variables) else Thinking()
        return self.session.render(conversation_of(body, self.service), variables, thinking).text


def text_of(body: PromptBody) -> str | None:
    """
    Raises:
        RequestError: there are two.
    """
    if body.content is not None and body.prompt is not None:
        raise RequestError("prompt: there is a text in content already", param="prompt")
    return body.prompt if body.content is None else body.content


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
