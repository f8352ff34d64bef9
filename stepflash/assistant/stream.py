"""What a stream carries, and what it amounts to.

A stream is a sequence of `Progress` (one per output of the engine: its token ids, log-probabilities and the running
usage), `TextLogprobs` and `Event`; the last item is the one `Finish`. `fold` turns it into an `Answer`; a reply that
is not streamed is that fold and nothing else, so it cannot differ from the streamed one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from stepflash.assistant.budget import Cut
from stepflash.chat.messages import (
    ContentDelta,
    Event,
    Finish,
    FinishReason,
    Message,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from stepflash.engine.request import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer cost so far, in tokens; `num_steps` counts runs of the trunk. `queue_seconds` it waited.

    `thinking_budget` is how much could be thought, None: any amount. `thinking_cut` says why the thought was
    closed, if it was. `task_reasoning_tokens` counts thoughts since the last message of the user, where there is
    a budget for that. `deadline_reached`: the answer is what there was when the time of the request was over.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_draft_tokens: int = 0
    num_steps: int = 0
    queue_seconds: float = 0.0
    thinking_budget: int | None = None
    thinking_cut: Cut | None = None
    task_reasoning_tokens: int | None = None
    deadline_reached: bool = False

    def limits_json(self) -> dict[str, Any]:
        """What every API says about the limits of the thought, beside the number of its tokens, and about a deadline
        if that cut the answer."""
        return {
            **({"deadline_reached": True} if self.deadline_reached else {}),
            "thinking_budget_tokens": self.thinking_budget,
            "thinking_cut": self.thinking_cut,
            "task_reasoning_tokens": self.task_reasoning_tokens,
        }


def total_usage(usages: Sequence[Usage], num_choices: int = 1) -> Usage:
    """Usage of a reply; every `num_choices` answers in a row share one prompt, which is counted once."""
    prompts = usages[::num_choices]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        drafted_tokens=sum(usage.drafted_tokens for usage in usages),
        accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in usages),
        num_steps=sum(usage.num_steps for usage in usages),
        thinking_budget=next((usage.thinking_budget for usage in usages), None),
        thinking_cut=next((usage.thinking_cut for usage in usages if usage.thinking_cut), None),
        task_reasoning_tokens=max(
            (usage.task_reasoning_tokens for usage in usages if usage.task_reasoning_tokens is not None),
            default=None,
        ),
        deadline_reached=any(usage.deadline_reached for usage in usages),
    )


@dataclass(frozen=True, slots=True)
class Progress:
    """One output of the engine beside its events. `token_ids` holds no stop token; `usage` is running.
    `prompt_logprobs` come with the first, `stop_logprobs`, of the stop token, with the last."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    stop_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """Log-probabilities whose place in the answer is known now, where some were asked for: `content` are those of the
    text that follows as `ContentDelta`, `other` those of what came since the last such item and is no content: the
    thought, tags, calls. Together they are the answer's tokens, each once and in order."""

    other: tuple[TokenLogprob, ...] = ()
    content: tuple[TokenLogprob, ...] = ()


StreamItem = Progress | TextLogprobs | Event
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerToolCall:
    """A tool call; `arguments` is the JSON text as it was streamed."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. `content` and `reasoning` are None when the stream had none of it. `cut_call` is a call that a
    limit cut off: its arguments are the beginning of JSON text, and it is none of `tool_calls`."""

    finish_reason: FinishReason
    usage: Usage
    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[AnswerToolCall, ...] = ()
    cut_call: AnswerToolCall | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    stop_logprobs: tuple[TokenLogprob, ...] = ()
    text_logprobs: TextLogprobs = TextLogprobs()

    def to_message(self) -> Message:
        """The assistant message that continues the conversation."""
        calls = tuple(
            ToolCall(name=call.name, arguments=json.loads(call.arguments or "{}"), id=call.id)
            for call in self.tool_calls
        )
        return Message(
            role="assistant", content=self.content or "", reasoning=self.reasoning, tool_calls=calls
        )


@dataclass(slots=True)
class Fold:
    """Collects a stream; usable at any moment."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[AnswerToolCall] = field(default_factory=list)
    num_complete_calls: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_logprobs: list[TokenLogprob] = field(default_factory=list)
    text_logprobs: TextLogprobs = TextLogprobs()
    usage: Usage = field(default_factory=Usage)
    finish_reason: FinishReason = "abort"

    def add(self, item: StreamItem) -> None:
        match item:
            case Progress(token_ids, logprobs, usage, prompt_logprobs, stop_logprobs):
                self.token_ids.extend(token_ids)
                self.logprobs.extend(logprobs)
                self.prompt_logprobs.extend(prompt_logprobs)
                self.stop_logprobs.extend(stop_logprobs)
                self.usage = usage
            case TextLogprobs(other, content):
                before = self.text_logprobs
                self.text_logprobs = TextLogprobs(before.other + other, before.content + content)
            case ReasoningDelta(text):
                self.reasoning.append(text)
            case ContentDelta(text):
                self.content.append(text)
            case ToolCallStart(_, id, name):
                self.calls.append(AnswerToolCall(id=id, name=name, arguments=""))
            case ToolCallArguments(index, fragment):
                call = self.calls[index]
                self.calls[index] = replace(call, arguments=call.arguments + fragment)
            case ToolCallEnd(index):
                self.num_complete_calls = index + 1
            case Finish(reason):
                self.finish_reason = reason

    def answer(self) -> Answer:
        return Answer(
            finish_reason=self.finish_reason,
            usage=self.usage,
            content="".join(self.content) or None,
            reasoning="".join(self.reasoning) or None,
            tool_calls=tuple(self.calls[: self.num_complete_calls]),
            cut_call=next(iter(self.calls[self.num_complete_calls :]), None),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            stop_logprobs=tuple(self.stop_logprobs),
            text_logprobs=self.text_logprobs,
        )


async def fold(stream: AsyncIterator[StreamItem]) -> Answer:
    """The whole answer of a stream."""
    collected = Fold()
    async for item in stream:
        collected.add(item)
    return collected.answer()


async def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """The items of several streams, or their batches, as they come, each with the index of its stream.

    The first failure ends them all; closing this closes every stream.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((index, item))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    num_running = len(tasks)
    try:
        while num_running:
            index, entry = await queue.get()
            if entry is None:
                await tasks[index]
                num_running -= 1
            else:
                yield index, entry
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
