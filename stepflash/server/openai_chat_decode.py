"""Decodes the body of `/v1/chat/completions` into values; pure.

What a field does is listed in docs/api.md. A field that would change the answer and cannot be honoured is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stepflash.chat.messages import Conversation, Tool
from stepflash.chat.openai_messages import messages_from_openai, tools_from_openai
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.answer_request import AnswerRequest, shared_fields
from stepflash.server.openai_schema import ChatBody, num_choices, stream_options
from stepflash.server.sampling_fields import sampling_params, stop_strings
from stepflash.server.structured_output import read_format
from stepflash.server.thinking_fields import read_thinking
from stepflash.server.tool_choice import allowed_tools, demanded_calls
from stepflash.server.verbosity import with_verbosity


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(AnswerRequest):
    """A decoded body."""

    num_choices: int = 1
    include_usage: bool = False
    continuous_usage: bool = False


def decode(body: ChatBody, defaults: SamplingParams) -> ChatRequest:
    """Turn a checked body into values.

    Raises:
        RequestError: a value is wrong, or asks for something that is not supported.
    """
    messages = messages_from_openai(body.messages)
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    tools, calls = _apply_tool_choice(body.tool_choice, tools_from_openai(body.tools or ()))
    if body.parallel_tool_calls is False:
        calls = replace(calls, is_single=True)
    num_logprobs = None
    if body.logprobs:
        num_logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    max_tokens = ("max_completion_tokens", body.max_completion_tokens)
    if body.max_completion_tokens is None:
        max_tokens = ("max_tokens", body.max_tokens)
    options = stream_options(body)
    return ChatRequest(
        conversation=with_verbosity(
            Conversation(messages=messages, tools=tools), body.verbosity, "verbosity"
        ),
        sampling=sampling_params(
            body,
            defaults,
            max_tokens=max_tokens,
            logprobs=("top_logprobs", num_logprobs),
            stop=stop_strings("stop", body.stop),
        ),
        num_choices=num_choices(body),
        stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        answer_format=read_format(body, body.response_format, "response_format"),
        calls=calls,
        **shared_fields(
            body, read_thinking(body, effort=body.reasoning_effort, effort_param="reasoning_effort")
        ),
    )


def _apply_tool_choice(
    choice: str | Mapping[str, Any] | None, tools: tuple[Tool, ...]
) -> tuple[tuple[Tool, ...], CallRules]:
    """The tools to offer, and what is demanded of them."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        known = {(tool.name, None) for tool in tools}
        names, choice = allowed_tools(choice.get("allowed_tools"), "tool_choice.allowed_tools", known)
        tools = tuple(tool for tool in tools if (tool.name, None) in names)
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
            "tool_choice must be 'auto', 'none', 'required', allowed tools, or name a function of tools",
            param="tool_choice",
        )
    return tools, demanded_calls(tools, name)
