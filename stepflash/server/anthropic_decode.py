"""Decodes the bodies of `/v1/messages` and `/v1/messages/count_tokens` into values; pure.

What a field does is listed in docs/api.md. Fields that nobody needs for the answer (metadata, service_tier,
context_management, betas, cache_control, ...) are ignored, as are unknown ones: clients send new ones before
servers know them. What would change the answer and cannot be honoured is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stepflash.assistant.budget import NO_THOUGHT, Thinking
from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.messages import Conversation, Message, Tool
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.anthropic_messages import messages_from_anthropic, tools_from_anthropic
from stepflash.server.structured_output import answer_format
from stepflash.server.thinking_fields import ThinkingBody, read_thinking
from stepflash.server.tool_choice import demanded_calls

MAX_STOP_SEQUENCES = 64


class MessagesBody(ThinkingBody):
    """Body of both routes; only one of them needs `max_tokens`."""

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    output_config: dict[str, Any] | None = None
    output_format: Any = None
    container: Any = None
    mcp_servers: list[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesRequest:
    """A decoded body. `prefill` is the beginning of the answer, in the client's own words, which the reply does not
    repeat."""

    model: str | None
    conversation: Conversation
    sampling: SamplingParams
    max_tokens: int
    deferred_tools: tuple[Tool, ...] = ()
    stream: bool = False
    prefill: str = ""
    max_tool_calls: int | None = None
    shows_thinking: bool = True
    thinking: Thinking = NO_THOUGHT
    answer_format: AnswerFormat | None = None
    calls: CallRules = FREE_CALLS


def decode_conversation(body: MessagesBody) -> tuple[Conversation, tuple[Tool, ...]]:
    """The conversation, and the tools that may be called but are not listed in its head.

    Raises:
        RequestError: a message or a tool is wrong.
    """
    tools = tools_from_anthropic(body.tools or ())
    if not body.messages:
        raise RequestError("messages: at least one message is required", param="messages")
    messages = messages_from_anthropic(body.system, body.messages, tools)
    return Conversation(messages=messages, tools=tools.listed), tools.deferred


def decode(body: MessagesBody, defaults: SamplingParams) -> MessagesRequest:
    """Turn a checked body into values.

    Raises:
        RequestError: a value is wrong, or asks for something that is not supported.
    """
    _refuse_unsupported(body)
    if body.max_tokens is None:
        raise RequestError("max_tokens: field required", param="max_tokens")
    conversation, deferred = decode_conversation(body)
    given_text = ""
    if (last := conversation.messages[-1]).role == "assistant":
        given_text = _given_text(last)
        conversation = replace(conversation, messages=conversation.messages[:-1])
        if not conversation.messages:
            raise RequestError("messages: a message of the user must come first", param="messages")
    conversation, deferred, calls = _apply_tool_choice(body, conversation, deferred)
    config = body.output_config or {}
    param = "output_config.format" if "format" in config else "output_format"
    form = answer_format(config.get("format", body.output_format), param)
    if given_text and (calls.demanded or form is not None):
        raise RequestError(
            "messages: the answer cannot begin with given text and with a demanded call or format",
            param="messages",
        )
    thinking = read_thinking(body, effort=config.get("effort"), effort_param="output_config.effort")
    return MessagesRequest(
        model=body.model,
        conversation=conversation,
        sampling=_sampling(body, defaults),
        max_tokens=body.max_tokens,
        deferred_tools=deferred,
        stream=bool(body.stream),
        prefill=given_text,
        max_tool_calls=1 if calls.is_single else None,
        shows_thinking=(body.thinking or {}).get("display") != "omitted",
        thinking=thinking if thinks(body) else NO_THOUGHT,
        answer_format=form,
        calls=calls,
    )


def _given_text(message: Message) -> str:
    if message.tool_calls:
        raise RequestError(
            "messages: the last message calls tools, so their results must follow", param="messages"
        )
    return message.content


def thinks(body: MessagesBody) -> bool:
    """Whether the client wants a thought; without the field it does not."""
    kind = (body.thinking or {"type": "disabled"}).get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise RequestError(
            f"thinking.type: {kind!r} is not one of enabled, adaptive, disabled", param="thinking.type"
        )
    return bool(kind != "disabled")


def _apply_tool_choice(
    body: MessagesBody, conversation: Conversation, deferred: tuple[Tool, ...]
) -> tuple[Conversation, tuple[Tool, ...], CallRules]:
    """The conversation with the tools to offer, those that wait, and what is demanded of them."""
    choice = body.tool_choice or {"type": "auto"}
    is_single = choice.get("disable_parallel_tool_use") is True
    tools = (*conversation.tools, *deferred)
    match choice.get("type"):
        case "auto":
            return conversation, deferred, CallRules(is_single=is_single)
        case "none":
            return replace(conversation, tools=()), (), FREE_CALLS
        case "any":
            return conversation, deferred, replace(demanded_calls(tools), is_single=is_single)
        case "tool":
            name = choice.get("name")
            if not isinstance(name, str):
                raise RequestError("tool_choice.name: field required", param="tool_choice.name")
            return conversation, deferred, demanded_calls(tools, name)
    raise RequestError(
        f"tool_choice.type: {choice.get('type')!r} is not one of auto, any, tool, none",
        param="tool_choice.type",
    )


def _sampling(body: MessagesBody, defaults: SamplingParams) -> SamplingParams:
    stop = tuple(body.stop_sequences or ())
    if len(stop) > MAX_STOP_SEQUENCES or not all(stop):
        raise RequestError(
            f"stop_sequences: at most {MAX_STOP_SEQUENCES} strings are allowed, none of them empty",
            param="stop_sequences",
        )
    given: dict[str, Any] = {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": stop,
    }
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _refuse_unsupported(body: MessagesBody) -> None:
    for name, is_set, reason in (
        ("container", body.container is not None, "there are no containers"),
        ("mcp_servers", bool(body.mcp_servers), "the server connects to no other servers"),
    ):
        if is_set:
            raise RequestError(f"{name}: {reason}", param=name, code="unsupported_parameter")
