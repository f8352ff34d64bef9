"""Encodes answers as the stream events of `/v1/messages`; pure.

`MessageEncoder` turns the items of an answer into events, `fold_message` turns events into the message that they
tell. The reply that is not streamed is that fold, so it cannot differ from the streamed one.

Blocks follow each other as the model wrote them: a thought, text, tool calls, more text. A thought that the client
does not want to see travels in the block's signature, so that it comes back with the next request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from stepflash.assistant.stream import Progress, StreamItem, Usage
from stepflash.chat.messages import (
    ContentDelta,
    Finish,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from stepflash.server.sealed_thought import seal

Event = dict[str, Any]
PING: Mapping[str, Any] = {"type": "ping"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageHead:
    """What is known of a reply before it begins.

    `is_context_limit` says that the context, not the client, limits its length.
    """

    id: str
    model: str
    num_prompt_tokens: int
    shows_thinking: bool = True
    is_context_limit: bool = False


class MessageEncoder:
    """Encodes the stream of one message."""

    def __init__(self, head: MessageHead) -> None:
        self._head = head
        self._usage = Usage(prompt_tokens=head.num_prompt_tokens)
        self._num_blocks = 0
        self._open: str | None = None  # the type of the block that has begun
        self._thought: list[str] = []

    def start(self) -> Iterator[Event]:
        """The events before anything is known of the answer."""
        message: Event = {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_json(self._usage),
        }
        yield {"type": "message_start", "message": message}
        yield dict(PING)

    def encode(self, item: StreamItem) -> Iterator[Event]:
        match item:
            case Progress():
                self._usage = item.usage
            case ReasoningDelta(text):
                yield from self._reasoning(text)
            case ContentDelta(text):
                yield from self._text(text)
            case ToolCallStart(_, id, name):
                block_id = "toolu_" + id.removeprefix("call_")
                yield from self._begin({"type": "tool_use", "id": block_id, "name": name, "input": {}})
            case ToolCallArguments(_, fragment):
                yield self._delta({"type": "input_json_delta", "partial_json": fragment})
            case ToolCallEnd():
                yield from self._end()
            case Finish():
                yield from self._end()
                yield self._message_delta(item)
                yield {"type": "message_stop"}

    def _reasoning(self, text: str) -> Iterator[Event]:
        if self._open != "thinking":
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
        if self._head.shows_thinking:
            yield self._delta({"type": "thinking_delta", "thinking": text})
        else:
            self._thought.append(text)

    def _text(self, text: str) -> Iterator[Event]:
        if self._open != "text":
            yield from self._begin({"type": "text", "text": ""})
        yield self._delta({"type": "text_delta", "text": text})

    def _begin(self, block: Event) -> Iterator[Event]:
        yield from self._end()
        yield {"type": "content_block_start", "index": self._num_blocks, "content_block": block}
        self._open = block["type"]
        self._num_blocks += 1

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _end(self) -> Iterator[Event]:
        if self._open is None:
            return
        if self._thought:
            yield self._delta({"type": "signature_delta", "signature": seal("".join(self._thought))})
            self._thought = []
        yield {"type": "content_block_stop", "index": self._num_blocks - 1}
        self._open = None

    def _message_delta(self, finish: Finish) -> Event:
        reason, stop_sequence = "end_turn", None
        if finish.reason == "tool_calls":
            reason = "tool_use"
        elif finish.reason == "length":
            reason = "model_context_window_exceeded" if self._head.is_context_limit else "max_tokens"
        elif finish.stop_string is not None:
            reason, stop_sequence = "stop_sequence", finish.stop_string
        delta = {"stop_reason": reason, "stop_sequence": stop_sequence}
        return {"type": "message_delta", "delta": delta, "usage": usage_json(self._usage)}


def fold_message(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole message that a complete stream of events tells."""
    message: dict[str, Any] = {}
    inputs: dict[int, list[str]] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = dict(event["message"], content=[])
            case "content_block_start":
                message["content"].append(dict(event["content_block"]))
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        inputs.setdefault(event["index"], []).append(delta["partial_json"])
            case "message_delta":
                message.update(event["delta"], usage=event["usage"])
    for index, fragments in inputs.items():
        # Of a call that was cut off, the whole values, as the client of a stream reads it.
        message["content"][index]["input"] = from_json("".join(fragments), allow_partial=True)
    return message


def usage_json(usage: Usage) -> dict[str, Any]:
    """Anthropic counts cached tokens of the prompt beside `input_tokens`, not among them."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {
            "thinking_tokens": usage.reasoning_tokens,
            "accepted_draft_tokens": usage.accepted_draft_tokens,
            "drafted_tokens": usage.drafted_tokens,
            **usage.limits_json(),
        },
    }
