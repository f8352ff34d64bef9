"""Decodes the body of `/v1/responses` into values; pure.

What a field does is listed in docs/api.md. A field that would change the answer and cannot be honoured is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stepflash.assistant.session import NO_THINKING
from stepflash.chat.messages import Conversation, Message
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.body import Body
from stepflash.server.openai_chat_decode import REASONING_EFFORTS
from stepflash.server.openai_responses_items import messages_from_items
from stepflash.server.openai_responses_tools import Toolbox, read_tools
from stepflash.server.tool_choice import forced_call


class ResponsesBody(Body):
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
    reasoning: dict[str, Any] | None = None
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
    prefill: str = ""
    max_tool_calls: int | None = None
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
    toolbox, prefill, max_tool_calls = _apply_tool_choice(body.tool_choice, toolbox)
    if body.parallel_tool_calls is False:
        max_tool_calls = 1
    if not prefill and _effort(body) in ("none", "minimal"):
        prefill = NO_THINKING
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
        prefill=prefill,
        max_tool_calls=max_tool_calls,
        echo={
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": _effort(body), "summary": None},
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
        },
    )


def _apply_tool_choice(
    choice: str | Mapping[str, Any] | None, toolbox: Toolbox
) -> tuple[Toolbox, str, int | None]:
    """The tools to offer, the beginning of the answer that forces a call, and the limit of calls."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        toolbox = toolbox.only(_allowed(choice))
        choice = choice.get("mode", "auto")
    if choice is None or choice == "auto":
        return toolbox, "", None
    if choice == "none":
        return Toolbox(), "", None
    if choice == "required":
        return toolbox, forced_call(toolbox.tools), None
    if (
        isinstance(choice, Mapping)
        and choice.get("type") in ("function", "custom")
        and isinstance(choice.get("name"), str)
    ):
        return toolbox, forced_call(toolbox.tools, toolbox.model_name(choice["name"], None)), 1
    raise RequestError(
        "tool_choice must be 'auto', 'none', 'required', allowed tools, or name a function or custom tool",
        param="tool_choice",
    )


def _allowed(choice: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    listed = choice.get("tools")
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise RequestError("tool_choice.tools: must be a list of tools", param="tool_choice.tools")
    return [(str(item.get("name")), item.get("namespace")) for item in listed]


def _effort(body: ResponsesBody) -> str | None:
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and effort not in REASONING_EFFORTS:
        known = ", ".join(REASONING_EFFORTS)
        raise RequestError(f"reasoning.effort: {effort!r} is not one of {known}", param="reasoning.effort")
    return effort


def _refuse_unsupported(body: ResponsesBody) -> None:
    text_format = (body.text or {}).get("format") or {"type": "text"}
    kind = text_format.get("type") if isinstance(text_format, Mapping) else text_format
    refused: tuple[tuple[str, bool, str], ...] = (
        ("background", bool(body.background), "responses run while the client is connected"),
        ("conversation", body.conversation is not None, "send the items, or previous_response_id"),
        ("prompt", body.prompt is not None, "there are no stored prompts; send instructions and input"),
        ("top_logprobs", bool(body.top_logprobs), "only /v1/chat/completions has log-probabilities"),
        ("text.format", kind != "text", f"type {kind!r} is not supported yet; only 'text' is"),
    )
    for name, is_set, reason in refused:
        if is_set:
            raise RequestError(f"{name}: {reason}", param=name, code="unsupported_parameter")
