"""Decodes the body of `/v1/chat/completions` into values; pure.

What a field does is listed in docs/api.md. A field that would change the answer and cannot be honoured is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stepflash.assistant.budget import NO_THOUGHT, Thinking
from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.messages import Conversation, Tool
from stepflash.chat.openai_messages import messages_from_openai, tools_from_openai
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.openai_schema import ChatBody, num_choices, sampling_params
from stepflash.server.structured_output import answer_format, structured_outputs
from stepflash.server.thinking_fields import read_thinking, turns_thinking_off
from stepflash.server.tool_choice import demanded_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A decoded body."""

    model: str | None
    conversation: Conversation
    sampling: SamplingParams
    num_choices: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    max_tool_calls: int | None = None
    thinking: Thinking = field(default_factory=Thinking)
    answer_format: AnswerFormat | None = None
    calls: CallRules = FREE_CALLS
    template_variables: Mapping[str, Any] = field(default_factory=dict)


def decode(body: ChatBody, defaults: SamplingParams) -> ChatRequest:
    """Turn a checked body into values.

    Raises:
        RequestError: a value is wrong, or asks for something that is not supported.
    """
    _refuse_unsupported(body)
    messages = messages_from_openai(body.messages)
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    tools = tools_from_openai(body.tools or ())
    tools, calls = _apply_tool_choice(body.tool_choice, tools)
    if body.parallel_tool_calls is False:
        calls = replace(calls, is_single=True)
    thinking = read_thinking(body, effort=body.reasoning_effort, effort_param="reasoning_effort")
    if turns_thinking_off(body.chat_template_kwargs or {}):
        thinking = NO_THOUGHT
    wants_logprobs = bool(body.logprobs)
    if body.top_logprobs is not None and not wants_logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    stream_options = body.stream_options
    return ChatRequest(
        model=body.model,
        conversation=Conversation(messages=messages, tools=tools),
        sampling=sampling_params(
            body,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
            defaults=defaults,
        ),
        num_choices=num_choices(body),
        stream=bool(body.stream),
        include_usage=bool(stream_options and stream_options.include_usage),
        continuous_usage=bool(stream_options and stream_options.continuous_usage_stats),
        max_tool_calls=1 if calls.is_single else None,
        thinking=thinking,
        answer_format=answer_format(body.response_format, "response_format")
        or structured_outputs(body.structured_outputs),
        calls=calls,
        template_variables=body.chat_template_kwargs or {},
    )


def _apply_tool_choice(
    choice: str | Mapping[str, Any] | None, tools: tuple[Tool, ...]
) -> tuple[tuple[Tool, ...], CallRules]:
    """The tools to offer, and what is demanded of them."""
    if choice is None or choice == "auto":
        return tools, FREE_CALLS
    if choice == "none":
        return (), FREE_CALLS
    if choice == "required":
        return tools, demanded_calls(tools)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            "tool_choice must be 'auto', 'none', 'required' or name a function of tools", param="tool_choice"
        )
    return tools, demanded_calls(tools, name)


def _refuse_unsupported(body: ChatBody) -> None:
    refused: tuple[tuple[str, bool, str], ...] = (
        ("audio", body.audio is not None, "this model writes text only"),
        ("modalities", bool(body.modalities) and body.modalities != ["text"], "this model writes text only"),
        ("web_search_options", body.web_search_options is not None, "there is no built-in web search"),
        ("functions", bool(body.functions), "use tools instead"),
        ("function_call", body.function_call not in (None, "none"), "use tool_choice instead"),
    )
    for name, is_set, reason in refused:
        if is_set:
            raise RequestError(f"{name}: {reason}", param=name, code="unsupported_parameter")
