"""Conversations and what comes out of them, as plain values.

Every wire format decodes into `Conversation` and encodes from `Event`; nothing above or below needs to know
the other side. No torch here, no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool by the assistant; `arguments` is always an object, never a JSON string."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that the model may call. `definition` is the whole object as the client sent it.

    `is_strict`: the client wants arguments that its schema allows, not only hints at them. `param` is where that
    schema stands in the client's request.
    """

    definition: Mapping[str, Any]
    is_strict: bool = False
    param: str = field(default="tools", compare=False)

    @property
    def name(self) -> str:
        return str(self._function.get("name", ""))

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON schema of the arguments; empty when the client gave none."""
        return self._function.get("parameters") or {}

    @property
    def _function(self) -> Mapping[str, Any]:
        inner = self.definition.get("function")
        return inner if isinstance(inner, Mapping) else self.definition


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message. `reasoning` is the thought before `content`; only assistants have it or `tool_calls`."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What the model is asked to continue."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the thought."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More text of the answer. `end` is where it ends in what the model wrote, in characters: what a log-probability
    belongs to is found by that."""

    text: str
    end: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins. `index` counts the calls of this answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON text of the arguments; the fragments of one call join to one valid JSON object, or to the
    beginning of one if a limit cut the call off."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A tool call is complete; one that was cut off has no end. `repaired` tells that the model's text was malformed
    and was mended."""

    index: int
    repaired: bool = False


FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Finish:
    """The answer is complete; always the last event, and there is exactly one. `stop_string` is the one that
    ended it, if one did."""

    reason: FinishReason
    stop_string: str | None = None


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedMessage:
    """A whole answer. What is empty is None, so that "no thought" and "an empty thought" are one."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"

    def as_message(self) -> Message:
        """The message to append to the conversation."""
        return Message(
            role="assistant", content=self.content or "", reasoning=self.reasoning, tool_calls=self.tool_calls
        )


def join_events(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring pieces of one text joined: what does not depend on how it arrived."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        match (last, event):
            case (ReasoningDelta(before), ReasoningDelta(text)):
                joined[-1] = ReasoningDelta(before + text)
            case (ContentDelta(before), ContentDelta(text, end)):
                joined[-1] = ContentDelta(before + text, end)
            case (ToolCallArguments(index, before), ToolCallArguments(other, text)) if index == other:
                joined[-1] = ToolCallArguments(index, before + text)
            case _:
                joined.append(event)
    return joined


def fold_events(events: Iterable[Event]) -> ParsedMessage:
    """The whole answer that a stream of events tells in pieces."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: list[ToolCallStart] = []
    fragments: list[list[str]] = []
    num_complete = 0
    finish_reason: FinishReason = "stop"
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallStart():
                starts.append(event)
                fragments.append([])
            case ToolCallArguments(index, fragment):
                fragments[index].append(fragment)
            case ToolCallEnd(index):
                num_complete = index + 1
            case Finish(reason):
                finish_reason = reason
    return ParsedMessage(
        reasoning="".join(reasoning) or None,
        content="".join(content) or None,
        tool_calls=tuple(
            ToolCall(id=start.id, name=start.name, arguments=json.loads("".join(parts)))
            for start, parts in zip(starts[:num_complete], fragments[:num_complete], strict=True)
        ),
        finish_reason=finish_reason,
    )
