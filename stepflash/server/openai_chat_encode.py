"""Encodes answers as replies of `/v1/chat/completions`; pure.

`response` encodes whole answers, `chunks` a stream. Both see the same items, so the chunks of a stream add up
to the response.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from stepflash.assistant.stream import Answer, Progress, StreamItem, TextLogprobs, Usage, total_usage
from stepflash.chat.messages import (
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from stepflash.engine.request import TokenLogprob
from stepflash.server.openai_chat_decode import ChatRequest
from stepflash.server.sse import frame, text_frame

LOWEST_LOGPROB = -9999.0

TokenBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What every chunk of one reply repeats, and the fields in which it tells the thought."""

    id: str
    created: int
    model: str
    reasoning_fields: tuple[str, ...] = ("reasoning_content",)


def response(head: ResponseHead, answers: Sequence[Answer], token_bytes: TokenBytes) -> dict[str, Any]:
    """The reply that is not streamed; one choice per answer."""
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [_choice(head, index, answer, token_bytes) for index, answer in enumerate(answers)],
        "usage": usage_json(total_usage([answer.usage for answer in answers], len(answers))),
    }


async def frames(
    head: ResponseHead,
    batches: AsyncGenerator[tuple[int, list[StreamItem]]],
    request: ChatRequest,
    token_bytes: TokenBytes,
) -> AsyncGenerator[bytes]:
    """The streamed reply: `batches` are the items of all choices as they come."""
    encoders = [ChoiceEncoder(head, index, token_bytes) for index in range(request.num_choices)]
    usages = [Usage()] * request.num_choices
    yield frame(_chunk(head, [encoder.start() for encoder in encoders]))
    num_running = len(encoders)
    async with aclosing(batches):
        async for index, batch in batches:
            encoder, parts = encoders[index], []
            for item in batch:
                if isinstance(item, Progress):
                    usages[index] = item.usage
                elif not request.continuous_usage and (text := encoder.text_frame(item)) is not None:
                    parts.append(text)
                else:
                    running = total_usage(usages, len(usages)) if request.continuous_usage else None
                    parts += [frame(_chunk(head, [choice], running)) for choice in encoder.encode(item)]
            num_running -= isinstance(batch[-1], Finish)
            if request.include_usage and not num_running:
                parts.append(frame(_chunk(head, [], total_usage(usages, len(usages)))))
            if parts:
                yield b"".join(parts)


def _chunk(
    head: ResponseHead, choices: Sequence[Mapping[str, Any]], usage: Usage | None = None
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "id": head.id,
        "object": "chat.completion.chunk",
        "created": head.created,
        "model": head.model,
        "choices": list(choices),
    }
    if usage is not None:
        data["usage"] = usage_json(usage)
    return data


class ChoiceEncoder:
    """Encodes the stream of one choice; log-probabilities travel with the chunk whose text is theirs."""

    def __init__(self, head: ResponseHead, index: int, token_bytes: TokenBytes) -> None:
        self._head = head
        self._index = index
        self._token_bytes = token_bytes
        self._logprobs: TextLogprobs | None = None
        self._text_frames: dict[type, Callable[[str], bytes]] = {}

    def text_frame(self, item: StreamItem) -> bytes | None:
        """The frame of a piece of text that has no log-probabilities, as nearly all have none; None for any other
        item, which `encode` encodes."""
        if not isinstance(item, ReasoningDelta | ContentDelta) or self._logprobs is not None:
            return None
        kind = type(item)
        if kind not in self._text_frames:
            self._text_frames[kind] = text_frame(
                lambda text: _chunk(self._head, list(self.encode(kind(text))))
            )
        return self._text_frames[kind](item.text)

    def start(self) -> dict[str, Any]:
        """The first choice object of a stream."""
        return self._choice({"role": "assistant"})

    def encode(self, item: StreamItem) -> Iterator[dict[str, Any]]:
        """The choice objects that an item amounts to: none or one."""
        match item:
            case Progress():
                return
            case TextLogprobs():
                self._logprobs = item
            case Finish(reason):
                yield self._choice({}, finish_reason=finish_reason(reason))
            case _ if (delta := _delta(self._head, item)) is not None:
                yield self._choice(delta)

    def _choice(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs, self._logprobs = self._logprobs or TextLogprobs(), None
        return {
            "index": self._index,
            "delta": dict(delta),
            "logprobs": choice_logprobs(logprobs, self._token_bytes),
            "finish_reason": finish_reason,
        }


def finish_reason(reason: str) -> str:
    """OpenAI's word; an aborted answer is one that ended early."""
    return reason if reason in ("stop", "length", "tool_calls") else "stop"


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            **usage.limits_json(),
            "accepted_draft_tokens": usage.accepted_draft_tokens,
            "drafted_tokens": usage.drafted_tokens,
            "num_steps": usage.num_steps,
        },
    }


def choice_logprobs(logprobs: TextLogprobs, token_bytes: TokenBytes) -> dict[str, Any] | None:
    """`content` covers the tokens of the answer's text, as OpenAI says; `other`, an extension, those of the thought,
    of tags and of calls. None if there are none of either."""
    if not logprobs.content and not logprobs.other:
        return None
    told: dict[str, Any] = {"content": logprobs_json(logprobs.content, token_bytes), "refusal": None}
    if logprobs.other:
        told["other"] = logprobs_json(logprobs.other, token_bytes)
    return told


def logprobs_json(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> list[dict[str, Any]]:
    """Tokens with what else could have stood there."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token_id)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}

    return [
        {
            **entry(token.token_id, token.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.top],
        }
        for token in logprobs
    ]


def finite(logprob: float) -> float:
    """JSON has no infinity; a token that a filter ruled out gets what other servers write for it."""
    return max(logprob, LOWEST_LOGPROB)


def _choice(head: ResponseHead, index: int, answer: Answer, token_bytes: TokenBytes) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning is not None:
        message |= dict.fromkeys(head.reasoning_fields, answer.reasoning)
    calls = answer.tool_calls if answer.cut_call is None else (*answer.tool_calls, answer.cut_call)
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": choice_logprobs(answer.text_logprobs, token_bytes),
        "finish_reason": finish_reason(answer.finish_reason),
    }


def _delta(head: ResponseHead, event: Event) -> dict[str, Any] | None:
    match event:
        case ReasoningDelta(text):
            return dict.fromkeys(head.reasoning_fields, text)
        case ContentDelta(text):
            return {"content": text}
        case ToolCallStart(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case ToolCallArguments(index, fragment):
            return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
    return None
