"""Decodes the body of `/v1/chat/completions` into values; pure.

What a field does is listed in docs/api.md. A field that would change the answer and cannot be honoured is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepflash.assistant.session import NO_THINKING
from stepflash.chat.messages import Conversation, Tool
from stepflash.chat.openai_messages import messages_from_openai, tools_from_openai
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.openai_schema import ChatBody, num_choices, sampling_params
from stepflash.server.tool_choice import forced_call

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A decoded body. `prefill` is the beginning of the answer that the request forces."""

    model: str | None
    conversation: Conversation
    sampling: SamplingParams
    num_choices: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    prefill: str = ""
    max_tool_calls: int | None = None
    max_thinking_tokens: int | None = None
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
    tools, forced_call, max_tool_calls = _apply_tool_choice(body.tool_choice, tools)
    if body.parallel_tool_calls is False:
        max_tool_calls = 1
    prefill = forced_call or (NO_THINKING if _wants_no_thinking(body) else "")
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
        prefill=prefill,
        max_tool_calls=max_tool_calls,
        max_thinking_tokens=_thinking_budget(body),
        template_variables=body.chat_template_kwargs or {},
    )


def _apply_tool_choice(
    choice: str | Mapping[str, Any] | None, tools: tuple[Tool, ...]
) -> tuple[tuple[Tool, ...], str, int | None]:
    """The tools to offer, the beginning of the answer that forces a call, and the limit of calls."""
    if choice is None or choice == "auto":
        return tools, "", None
    if choice == "none":
        return (), "", None
    if choice == "required":
        return tools, forced_call(tools), None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            "tool_choice must be 'auto', 'none', 'required' or name a function of tools", param="tool_choice"
        )
    return tools, forced_call(tools, name), 1


def _wants_no_thinking(body: ChatBody) -> bool:
    kwargs = body.chat_template_kwargs or {}
    return (
        body.reasoning_effort in ("none", "minimal")
        or kwargs.get("enable_thinking") is False
        or kwargs.get("thinking") is False
        or (body.thinking or {}).get("type") == "disabled"
        or _thinking_budget(body) == 0
    )


def _thinking_budget(body: ChatBody) -> int | None:
    """The limit of the thought by any of the names that clients use for it; 0 is no thought at all."""
    for name, budget in (
        ("thinking_budget", body.thinking_budget),
        ("thinking_token_budget", body.thinking_token_budget),
        ("thinking.budget_tokens", (body.thinking or {}).get("budget_tokens")),
    ):
        if budget is not None:
            if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
                raise RequestError(f"{name}: must be a whole number, 0 or more, got {budget!r}", param=name)
            return budget
    return None


def _refuse_unsupported(body: ChatBody) -> None:
    response_type = (body.response_format or {"type": "text"}).get("type")
    refused: tuple[tuple[str, bool, str], ...] = (
        ("audio", body.audio is not None, "this model writes text only"),
        ("modalities", bool(body.modalities) and body.modalities != ["text"], "this model writes text only"),
        ("web_search_options", body.web_search_options is not None, "there is no built-in web search"),
        ("functions", bool(body.functions), "use tools instead"),
        ("function_call", body.function_call not in (None, "none"), "use tool_choice instead"),
        (
            "response_format",
            response_type != "text",
            f"type {response_type!r} is not supported yet; only 'text' is",
        ),
    )
    for name, is_set, reason in refused:
        if is_set:
            raise RequestError(f"{name}: {reason}", param=name, code="unsupported_parameter")
    effort = body.reasoning_effort
    if effort is not None and effort not in REASONING_EFFORTS:
        known = ", ".join(REASONING_EFFORTS)
        raise RequestError(f"reasoning_effort: {effort!r} is not one of {known}", param="reasoning_effort")
