"""Encodes answers as the stream events of `/v1/responses`; pure.

Every event carries the next `sequence_number`. The last one holds the whole response, built from the items that the
events announced; the reply that is not streamed is that response, so it cannot differ from the streamed one.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stepflash.assistant.stream import Progress, StreamItem, TextLogprobs, Usage
from stepflash.chat.arguments import read_json
from stepflash.chat.messages import (
    ContentDelta,
    Finish,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from stepflash.errors import PromptTooLong, QueueFull, RequestError, StepflashError
from stepflash.server.openai_chat_encode import TokenBytes, logprobs_json
from stepflash.server.openai_responses_tools import CUSTOM_INPUT, Toolbox
from stepflash.server.sealed_thought import seal

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What is known of a response before it begins; `echo` holds fields of the request that it repeats.
    `seals_thoughts` writes a thought into `encrypted_content` too, for clients that send nothing else of it back."""

    id: str
    created_at: int
    model: str
    toolbox: Toolbox = field(default_factory=Toolbox)
    seals_thoughts: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)


class ResponseEncoder:
    """Encodes the stream of one response."""

    def __init__(self, head: ResponseHead, token_bytes: TokenBytes) -> None:
        self._head = head
        self._token_bytes = token_bytes
        self._num_events = 0
        self._output: list[Event] = []
        self._item: Event | None = None  # the last of the output, while it grows
        self._text: list[str] = []  # of that item, so far
        self._logprobs: list[Event] = []  # of that text
        self._next_logprobs: list[Event] = []  # of the text that comes next
        self._usage: Usage | None = None

    def start(self) -> Iterator[Event]:
        """The events before anything is known of the answer."""
        yield self._event("response.created", response=self.response("in_progress"))
        yield self.keep_alive()

    def keep_alive(self) -> Event:
        """An event that says that work goes on. Its list of output is empty: the items are told by others."""
        return self._event("response.in_progress", response={**self.response("in_progress"), "output": []})

    def encode(self, item: StreamItem) -> Iterator[Event]:
        match item:
            case Progress():
                self._usage = item.usage
            case TextLogprobs():
                self._next_logprobs = logprobs_json(item.content, self._token_bytes)
            case ReasoningDelta(text):
                if self._item is None or self._item["type"] != "reasoning":
                    yield from self._begin_text("reasoning", {"summary": []})
                yield self._part_event("response.reasoning_text.delta", delta=text)
                self._text.append(text)
            case ContentDelta(text):
                if self._item is None or self._item["type"] != "message":
                    yield from self._begin_text("message", {"role": "assistant"})
                logprobs, self._next_logprobs = self._next_logprobs, []
                yield self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)
                self._logprobs += logprobs
                self._text.append(text)
            case ToolCallStart(_, call_id, name):
                yield from self._begin_call(call_id, name)
            case ToolCallArguments(_, fragment):
                self._text.append(fragment)
                if self._item is not None and self._item["type"] == "function_call":
                    yield self._item_event("response.function_call_arguments.delta", delta=fragment)
            case ToolCallEnd():
                yield from self._end("completed")
            case Finish(reason):
                status = {"length": "incomplete", "abort": "cancelled"}.get(reason, "completed")
                yield from self._end("completed" if status == "completed" else "incomplete")
                kind = "completed" if status == "completed" else "incomplete"
                yield self._event(f"response.{kind}", response=self.response(status))

    def fail(self, error: StepflashError) -> Event:
        """The last event of a stream in which something went wrong."""
        message = str(error)
        match error:
            case PromptTooLong():
                code = "context_length_exceeded"
            case QueueFull():
                code = "rate_limit_exceeded"
                message = f"{message}; try again in {error.retry_after_seconds:.1f}s"
            case RequestError():
                code = "invalid_prompt"
            case _:
                code = "server_error"
        response = {**self.response("failed"), "error": {"code": code, "message": message}}
        return self._event("response.failed", response=response)

    def response(self, status: str) -> Event:
        """The response object as it is now."""
        is_late = self._usage is not None and self._usage.deadline_reached
        cut = {"reason": "deadline" if is_late else "max_output_tokens"}
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut if status == "incomplete" else None,
            "model": self._head.model,
            "output": list(self._output),
            **self._head.echo,
            "usage": None if self._usage is None or status == "in_progress" else usage_json(self._usage),
        }

    def _begin_text(self, kind: str, fields: Mapping[str, Any]) -> Iterator[Event]:
        prefix = "rs" if kind == "reasoning" else "msg"
        yield from self._begin({"type": kind, "id": _id(prefix), **fields, "content": []})
        yield self._part_event("response.content_part.added", part=self._part(""))

    def _begin_call(self, call_id: str, name: str) -> Iterator[Event]:
        tool = self._head.toolbox.client_tool(name)
        call: Event = {"call_id": call_id, "name": tool.name}
        if tool.namespace is not None:
            call["namespace"] = tool.namespace
        if tool.is_custom:
            yield from self._begin({"type": "custom_tool_call", "id": _id("ctc"), **call, "input": ""})
        else:
            yield from self._begin({"type": "function_call", "id": _id("fc"), **call, "arguments": ""})

    def _begin(self, item: Event) -> Iterator[Event]:
        yield from self._end("completed")
        self._item = {**item, "status": "in_progress"}
        self._text, self._logprobs = [], []
        self._output.append(self._item)
        yield self._item_event("response.output_item.added", item=dict(self._item))

    def _end(self, status: str) -> Iterator[Event]:
        """Close the item that grows, if there is one."""
        item, text = self._item, "".join(self._text)
        if item is None:
            return
        match item["type"]:
            case "function_call":
                done = {"arguments": text, "name": item["name"]}
                yield self._item_event("response.function_call_arguments.done", **done)
                item["arguments"] = text
            case "custom_tool_call":
                # Free text comes out of the JSON of the arguments when that is complete, so in one piece.
                item["input"] = _custom_input(text)
                yield self._item_event("response.custom_tool_call_input.delta", delta=item["input"])
                yield self._item_event("response.custom_tool_call_input.done", input=item["input"])
            case kind:
                if kind == "reasoning":
                    yield self._part_event("response.reasoning_text.done", text=text)
                else:
                    done = {"text": text, "logprobs": self._logprobs}
                    yield self._part_event("response.output_text.done", **done)
                yield self._part_event("response.content_part.done", part=self._part(text))
                item["content"] = [self._part(text)]
                if kind == "reasoning" and self._head.seals_thoughts:
                    item["encrypted_content"] = seal(text)
        item["status"] = status
        yield self._item_event("response.output_item.done", item=dict(item))
        self._item = None

    def _part(self, text: str) -> Event:
        if self._item is not None and self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        place: Event = {"output_index": len(self._output) - 1}
        if "item" not in fields:
            place["item_id"] = self._item["id"]
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_draft_tokens": usage.accepted_draft_tokens,
            "drafted_tokens": usage.drafted_tokens,
            **usage.limits_json(),
        },
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _custom_input(arguments: str) -> str:
    """The free text among a call's arguments, which may be cut off; a model that names its parameter otherwise is
    understood too."""
    values = read_json(arguments)
    text = values.get(CUSTOM_INPUT, next(iter(values.values()), "") if len(values) < 2 else arguments)
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
