"""Decodes the bodies of `/v1/messages` and `/v1/messages/count_tokens` into values; pure.

What a field does is listed in docs/api.md. Fields that nobody needs for the answer are ignored, as are unknown ones:
clients send new ones before servers know them. What would change the answer and cannot be honoured is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from stepflash.assistant.budget import NO_THOUGHT, Thinking
from stepflash.chat.messages import Conversation, Message, Tool
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.answer_request import AnswerBody, AnswerRequest, shared_fields
from stepflash.server.anthropic_messages import messages_from_anthropic, tools_from_anthropic
from stepflash.server.body import Items, Refusal
from stepflash.server.sampling_fields import SamplingBody, sampling_params, stop_strings
from stepflash.server.structured_output import read_format
from stepflash.server.thinking_fields import read_thinking
from stepflash.server.tool_choice import demanded_calls

# What the server would have to do to the context for the client; the first is what the template does anyway.
HARMLESS_EDITS = ("clear_thinking_",)


class MessagesBody(AnswerBody):
    """Body of `POST /v1/messages`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **SamplingBody.refused,
        "container": Refusal("there are no containers"),
        "mcp_servers": Refusal("the server connects to no other servers"),
        "compaction": Refusal("ask for a summary in a message"),
        "thread": Refusal("no conversations are kept; send all messages"),
        "stop": Refusal("use stop_sequences"),
        "n": Refusal("a message is one answer", harmless=(1,)),
        "response_format": Refusal("use output_config.format"),
        "reasoning_effort": Refusal("use output_config.effort"),
        "max_completion_tokens": Refusal("use max_tokens"),
        "logprobs": Refusal("messages have no log-probabilities; chat completions and responses do"),
        "top_logprobs": Refusal(
            "messages have no log-probabilities; chat completions and responses do", harmless=(0,)
        ),
    }
    ignored: ClassVar[frozenset[str]] = SamplingBody.ignored | {
        "betas",
        "billing_policy",
        "cache_control",
        "diagnostics",
        "fallback_credit_token",
        "fallbacks",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }

    messages: Items[dict[str, Any]]
    max_tokens: int
    system: str | Items[dict[str, Any]] | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    stop_sequences: Items[str] | None = None
    output_config: dict[str, Any] | None = None
    output_format: Any = None
    context_management: dict[str, Any] | None = None


class CountTokensBody(MessagesBody):
    """Body of `POST /v1/messages/count_tokens`: the same, without an answer."""

    max_tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesRequest(AnswerRequest):
    """A decoded body. The reply does not repeat `prefill`."""

    max_tokens: int
    shows_thinking: bool = True


def decode(body: MessagesBody, defaults: SamplingParams) -> MessagesRequest:
    """Turn a checked body into values.

    Raises:
        RequestError: a value is wrong, or asks for something that is not supported.
    """
    _refuse_edits(body.context_management)
    tools = tools_from_anthropic(body.tools or ())
    if not body.messages:
        raise RequestError("messages: at least one message is required", param="messages")
    messages = messages_from_anthropic(body.system, body.messages, tools)
    conversation, deferred = Conversation(messages=messages, tools=tools.listed), tools.deferred
    given_text = ""
    if (last := conversation.messages[-1]).role == "assistant":
        given_text = _given_text(last)
        conversation = replace(conversation, messages=conversation.messages[:-1])
        if not conversation.messages:
            raise RequestError("messages: a message of the user must come first", param="messages")
    conversation, deferred, calls = _apply_tool_choice(body, conversation, deferred)
    config = body.output_config or {}
    param = "output_config.format" if "format" in config else "output_format"
    form = read_format(body, config.get("format", body.output_format), param)
    if given_text and (calls.demanded or form is not None):
        raise RequestError(
            "messages: the answer cannot begin with given text and with a demanded call or format",
            param="messages",
        )
    return MessagesRequest(
        conversation=conversation,
        sampling=sampling_params(
            body,
            defaults,
            max_tokens=("max_tokens", body.max_tokens),
            stop=stop_strings("stop_sequences", body.stop_sequences),
        ),
        max_tokens=body.max_tokens,
        deferred_tools=deferred,
        stream=bool(body.stream),
        prefill=given_text,
        shows_thinking=(body.thinking or {}).get("display") != "omitted",
        answer_format=form,
        calls=calls,
        **shared_fields(body, _thinking(body, messages[-1])),
    )


def _given_text(message: Message) -> str:
    if message.tool_calls:
        raise RequestError(
            "messages: the last message calls tools, so their results must follow", param="messages"
        )
    return message.content


def _thinking(body: MessagesBody, last: Message) -> Thinking:
    """What may be thought; without the field nothing."""
    config = body.output_config or {}
    kind = "disabled" if body.thinking is None else body.thinking.get("type")
    if kind not in ("enabled", "adaptive", "disabled", "between_tools"):
        raise RequestError(
            f"thinking.type: {kind!r} is not one of enabled, adaptive, between_tools, disabled",
            param="thinking.type",
        )
    wanted = read_thinking(body, effort=config.get("effort"), effort_param="output_config.effort")
    if config.get("task_budget") is not None:
        wanted = _within_budget(wanted, config["task_budget"])
    # Between tools: when the results of some have come, not before the first call.
    thinks = kind in ("enabled", "adaptive") or (kind == "between_tools" and last.role == "tool")
    return wanted if thinks else NO_THOUGHT


def _within_budget(thinking: Thinking, budget: Any) -> Thinking:
    """A budget of the task counts all of its tokens; what can be kept of it is that the thoughts fit in. `remaining`
    is what is left of it for this answer, `total` is for all since the last message of the user."""
    if not isinstance(budget, Mapping):
        param = "output_config.task_budget"
        raise RequestError(f"{param}: must be an object with a total", param=param)
    limits: dict[str, int | None] = {}
    for name in ("total", "remaining"):
        value = limits[name] = budget.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            param = f"output_config.task_budget.{name}"
            raise RequestError(f"{param}: must be a whole number, 0 or more, got {value!r}", param=param)
    if thinking.task_tokens is None and limits["remaining"] is None:
        return replace(thinking, task_tokens=limits["total"])
    counts = [count for count in (thinking.max_tokens, limits["remaining"]) if count is not None]
    return replace(thinking, max_tokens=min(counts, default=None))


def _refuse_edits(management: Mapping[str, Any] | None) -> None:
    edits = (management or {}).get("edits") or []
    for index, edit in enumerate(edits if isinstance(edits, list) else [edits]):
        kind = edit.get("type") if isinstance(edit, Mapping) else edit
        if not str(kind).startswith(HARMLESS_EDITS):
            param = f"context_management.edits.{index}"
            raise RequestError(
                f"{param}: {kind!r} is not supported; the client must shorten the conversation",
                param="context_management",
                code="unsupported_parameter",
            )


def _apply_tool_choice(
    body: MessagesBody, conversation: Conversation, deferred: tuple[Tool, ...]
) -> tuple[Conversation, tuple[Tool, ...], CallRules]:
    """The conversation with the tools to offer, those that wait, and what is demanded of them."""
    choice = {"type": "auto"} if body.tool_choice is None else body.tool_choice
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
