"""Decodes the body of `/v1/responses` into values; pure.

What a field does is listed in docs/api.md. A field that would change the answer and cannot be honoured is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from stepflash.chat.messages import Conversation, Message
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules
from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.answer_request import AnswerBody, AnswerRequest, shared_fields
from stepflash.server.body import Items, Refusal
from stepflash.server.openai_responses_items import messages_from_items
from stepflash.server.openai_responses_tools import Toolbox, read_tools
from stepflash.server.openai_schema import NO_PREWARM, OPENAI_IGNORED
from stepflash.server.sampling_fields import SamplingBody, sampling_params, stop_strings
from stepflash.server.structured_output import read_format
from stepflash.server.thinking_fields import read_thinking
from stepflash.server.tool_choice import allowed_tools, demanded_calls
from stepflash.server.verbosity import with_verbosity

INCLUDE_LOGPROBS = "message.output_text.logprobs"
INCLUDE_THOUGHT = "reasoning.encrypted_content"


class ResponsesBody(AnswerBody):
    """Body of `POST /v1/responses`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **SamplingBody.refused,
        "background": Refusal("responses run while the client is connected"),
        "conversation": Refusal("send the items, or previous_response_id"),
        "prompt": Refusal("there are no stored prompts; send instructions and input"),
        "moderation": Refusal("there is no model for moderation here"),
        "prompt_cache_options.prewarm": NO_PREWARM,
        "reasoning.context": Refusal(
            "the model's template shows it the thoughts of the current task only",
            harmless=("auto", "current_turn"),
        ),
        "reasoning.mode": Refusal("there is one mode", harmless=("standard",)),
        "messages": Refusal("use input, or /v1/chat/completions"),
        "max_tokens": Refusal("use max_output_tokens"),
        "max_completion_tokens": Refusal("use max_output_tokens"),
        "n": Refusal("a response is one answer", harmless=(1,)),
        "response_format": Refusal("use text.format"),
        "reasoning_effort": Refusal("use reasoning.effort"),
        "verbosity": Refusal("use text.verbosity"),
        "logprobs": Refusal(f"use top_logprobs, and include {INCLUDE_LOGPROBS}"),
    }
    ignored: ClassVar[frozenset[str]] = (
        SamplingBody.ignored
        | OPENAI_IGNORED
        | {
            "access_programs",
            "background_options",
            "client_metadata",
            "context_management",
            "image",
            "max_tool_calls",
            "stream_options",
            "truncation",
        }
    ) - {"metadata"}

    input: str | Items[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: Items[str] | None = None
    stop: str | Items[str] | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest(AnswerRequest):
    """A decoded body. `items` is the whole input, earlier turns first; `echo` holds the fields that the response
    object repeats. `seals_thoughts` puts thoughts into `encrypted_content` too."""

    items: tuple[Any, ...]
    toolbox: Toolbox
    is_stored: bool = True
    seals_thoughts: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)


def decode(
    body: ResponsesBody, defaults: SamplingParams, earlier_items: Sequence[Any] = ()
) -> ResponsesRequest:
    """Turn a checked body into values; `earlier_items` are those of the previous response.

    Raises:
        RequestError: a value is wrong, or asks for something that is not supported.
    """
    toolbox = read_tools(body.tools or ())
    new_items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    items = (*earlier_items, *new_items)
    if not items:
        raise RequestError("input must hold at least one item", param="input")
    messages = messages_from_items(items, toolbox, num_earlier=len(earlier_items))
    if body.instructions:
        messages = (Message(role="system", content=body.instructions), *messages)
    toolbox, calls = _apply_tool_choice(body.tool_choice, toolbox)
    calls = replace(
        calls, is_single=calls.is_single or body.parallel_tool_calls is False, formats=toolbox.formats
    )
    text, include = body.text or {}, body.include or ()
    has_logprobs = INCLUDE_LOGPROBS in include or bool(body.top_logprobs)
    sampling = sampling_params(
        body,
        defaults,
        max_tokens=("max_output_tokens", body.max_output_tokens),
        logprobs=("top_logprobs", body.top_logprobs or 0 if has_logprobs else None),
        stop=stop_strings("stop", body.stop),
    )
    return ResponsesRequest(
        items=items,
        conversation=with_verbosity(
            Conversation(messages=messages, tools=toolbox.tools), text.get("verbosity"), "text.verbosity"
        ),
        toolbox=toolbox,
        sampling=sampling,
        stream=bool(body.stream),
        is_stored=body.store is not False,
        seals_thoughts=INCLUDE_THOUGHT in include,
        answer_format=read_format(body, text.get("format"), "text.format"),
        calls=calls,
        echo=_echo(body, sampling),
        **shared_fields(body, read_thinking(body)),
    )


def _echo(body: ResponsesBody, sampling: SamplingParams) -> dict[str, Any]:
    text = body.text or {}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "text": {
            "format": text.get("format") or {"type": "text"},
            "verbosity": text.get("verbosity") or "medium",
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
    }


def _apply_tool_choice(choice: str | Mapping[str, Any] | None, toolbox: Toolbox) -> tuple[Toolbox, CallRules]:
    """The tools to offer, and what is demanded of them."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        known = {(tool.name, tool.namespace) for tool in toolbox.clients.values()}
        allowed, choice = allowed_tools(choice, "tool_choice", known)
        toolbox = toolbox.only(allowed)
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
