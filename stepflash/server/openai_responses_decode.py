"""Decodes the body of `/v1/responses` into values; pure.

What a field does is listed in docs/api.md. A field that would change the answer and cannot be honoured is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stepflash.assistant.budget import Thinking
from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.messages import Conversation, Message
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.openai_responses_items import messages_from_items
from stepflash.server.openai_responses_tools import Toolbox, read_tools
from stepflash.server.structured_output import answer_format
from stepflash.server.thinking_fields import ThinkingBody, read_thinking
from stepflash.server.tool_choice import demanded_calls


class ResponsesBody(ThinkingBody):
    """Body of `POST /v1/responses`."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A decoded body. `items` is the whole input, earlier turns first; `echo` holds the fields that the response
    object repeats."""

    model: str | None
    items: tuple[Any, ...]
    conversation: Conversation
    toolbox: Toolbox
    sampling: SamplingParams
    stream: bool = False
    is_stored: bool = True
    max_tool_calls: int | None = None
    thinking: Thinking = field(default_factory=Thinking)
    answer_format: AnswerFormat | None = None
    calls: CallRules = FREE_CALLS
    echo: Mapping[str, Any] = field(default_factory=dict)


def decode(
    body: ResponsesBody, defaults: SamplingParams, earlier_items: Sequence[Any] = ()
) -> ResponsesRequest:
    """Turn a checked body into values; `earlier_items` are those of the previous response.

    Raises:
        RequestError: a value is wrong, or asks for something that is not supported.
    """
    _refuse_unsupported(body)
    toolbox = read_tools(body.tools or ())
    new_items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    items = (*earlier_items, *new_items)
    if not items:
        raise RequestError("input must hold at least one item", param="input")
    messages = messages_from_items(items, toolbox)
    if body.instructions:
        messages = (Message(role="system", content=body.instructions), *messages)
    toolbox, calls = _apply_tool_choice(body.tool_choice, toolbox)
    calls = replace(
        calls, is_single=calls.is_single or body.parallel_tool_calls is False, formats=toolbox.formats
    )
    form = (body.text or {}).get("format")
    given: dict[str, Any] = {
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    sampling = replace(defaults, **{name: value for name, value in given.items() if value is not None})
    return ResponsesRequest(
        model=body.model,
        items=items,
        conversation=Conversation(messages=messages, tools=toolbox.tools),
        toolbox=toolbox,
        sampling=sampling,
        stream=bool(body.stream),
        is_stored=body.store is not False,
        max_tool_calls=1 if calls.is_single else None,
        thinking=read_thinking(body),
        answer_format=answer_format(form, "text.format"),
        calls=calls,
        echo={
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
        },
    )


def _apply_tool_choice(choice: str | Mapping[str, Any] | None, toolbox: Toolbox) -> tuple[Toolbox, CallRules]:
    """The tools to offer, and what is demanded of them."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        toolbox = toolbox.only(_allowed(choice))
        choice = choice.get("mode", "auto")
    if choice is None or choice == "auto":
        return toolbox, FREE_CALLS
    if choice == "none":
        return Toolbox(), FREE_CALLS
    if choice == "required":
        return toolbox, demanded_calls(toolbox.tools)
    if (
        isinstance(choice, Mapping)
        and choice.get("type") in ("function", "custom")
        and isinstance(choice.get("name"), str)
    ):
        return toolbox, demanded_calls(toolbox.tools, toolbox.model_name(choice["name"], None))
    raise RequestError(
        "tool_choice must be 'auto', 'none', 'required', allowed tools, or name a function or custom tool",
        param="tool_choice",
    )


def _allowed(choice: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    listed = choice.get("tools")
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise RequestError("tool_choice.tools: must be a list of tools", param="tool_choice.tools")
    return [(str(item.get("name")), item.get("namespace")) for item in listed]


def _refuse_unsupported(body: ResponsesBody) -> None:
    refused: tuple[tuple[str, bool, str], ...] = (
        ("background", bool(body.background), "responses run while the client is connected"),
        ("conversation", body.conversation is not None, "send the items, or previous_response_id"),
        ("prompt", body.prompt is not None, "there are no stored prompts; send instructions and input"),
        ("top_logprobs", bool(body.top_logprobs), "only /v1/chat/completions has log-probabilities"),
    )
    for name, is_set, reason in refused:
        if is_set:
            raise RequestError(f"{name}: {reason}", param=name, code="unsupported_parameter")
