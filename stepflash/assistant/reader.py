"""Reads the answer to one prompt: token ids in, stream items out.

Between engine outputs it keeps what is unfinished: half a UTF-8 character, text that may become a tag or a
stop string, and the usage. Stop strings apply to the answer (`content`), not to the thought or to tool calls:
a thought that happens to hold one must not end the request with an empty answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stepflash.assistant.budget import limit_of
from stepflash.assistant.stream import Progress, StreamItem, TextLogprobs, Usage
from stepflash.assistant.task_ledger import Task
from stepflash.chat.messages import (
    ContentDelta,
    Event,
    Finish,
    FinishReason,
    ReasoningDelta,
    Tool,
    ToolCallEnd,
    ToolCallStart,
)
from stepflash.chat.parser import OutputParser
from stepflash.chat.thought_end import THINK_END, advance
from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.request import Output, Request, RequestStats, TokenLogprob
from stepflash.errors import EngineError, QueueFull


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A request ready to submit, and how to read its answer.

    `parse` False takes the answer as plain content. `tools` are those whose calls are read, whether or not the
    head of the prompt lists them. `prefill` is text of the answer that the prompt already contains; the events tell
    what follows, and the whole of a call that it opens.
    `max_tool_calls` ends the answer after that many calls. `task` is what a budget of the whole task counts in.
    """

    request: Request
    parse: bool = True
    in_reasoning: bool = True
    tools: tuple[Tool, ...] = ()
    prefill: str = ""
    max_tool_calls: int | None = None
    task: Task | None = None


class StopStrings:
    """Cuts a stream of text before the first stop string; holds back what may become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.num_unshown = 0  # characters of the last text behind what was shown

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string that was found, if one was (then nothing follows)."""
        if not self._stop:
            return text, None
        text = self._held + text
        # The one that is complete first, so that the result does not depend on how the text was cut.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, begin = min(found)
            self.num_unshown = len(text) - begin
            return text[:begin], text[begin:end]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        self.num_unshown = num_held
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back, when no stop string can follow any more."""
        held, self._held = self._held, ""
        return held


class PlainText:
    """Stands in for the parser where the answer is text and nothing else."""

    def __init__(self) -> None:
        self._num_chars = 0

    def push(self, text: str) -> list[Event]:
        self._num_chars += len(text)
        return [ContentDelta(text, self._num_chars)] if text else []

    def finish(self, reason: FinishReason) -> list[Event]:
        return [Finish(reason)]


class TokenPlaces:
    """Finds the tokens of pieces of text. A token whose bytes are only a part of a character counts with the one that
    completes it."""

    def __init__(self, num_given_chars: int) -> None:
        self._num_chars = self._num_taken = num_given_chars
        self._waiting: deque[tuple[int, TokenLogprob]] = (
            deque()
        )  # with the number of characters up to their end

    def add(self, token: TokenLogprob, text: str) -> None:
        self._num_chars += len(text)
        self._waiting.append((self._num_chars, token))

    def take(self, content: ContentDelta) -> TextLogprobs:
        """The tokens up to the end of `content`: those in front of it, and those that have a part in it."""
        begin = content.end - len(content.text)
        parts: list[TokenLogprob] = []  # of a character that is not complete
        other: list[TokenLogprob] = []
        inside: list[TokenLogprob] = []
        while self._waiting and self._num_taken < content.end:
            end, token = self._waiting.popleft()
            parts.append(token)
            if end > self._num_taken:
                (inside if end > begin else other).extend(parts)
                parts, self._num_taken = [], end
        return TextLogprobs(tuple(other), (*inside, *parts))

    def take_all(self) -> TextLogprobs:
        """What is left when no more content can follow."""
        other = tuple(token for _, token in self._waiting)
        self._waiting.clear()
        return TextLogprobs(other)


class AnswerReader:
    """State of one answer between engine outputs: text, parser, stop strings and usage."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        sampling = prompt.request.sampling
        self._prompt = prompt
        self._eos_token_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self._eos_token_ids |= tokenizer.eos_token_ids
        self._token_bytes = tokenizer.token_bytes
        self._detokenizer = tokenizer.detokenizer()
        self._parser: OutputParser | PlainText = PlainText()
        if prompt.parse:
            # Who offers no tools gets no calls: text that looks like one is then an example in the answer.
            self._parser = OutputParser(prompt.tools or None, in_reasoning=prompt.in_reasoning)
        self._stop = StopStrings(sampling.stop)
        self._may_end_early = bool(sampling.stop) or prompt.max_tool_calls is not None
        self._places = None if sampling.logprobs is None else TokenPlaces(len(prompt.prefill))
        self._content_end = 0
        self._pending_prefill = prompt.prefill
        self._is_reasoning = prompt.in_reasoning and THINK_END.decode() not in prompt.prefill
        self._end_progress = 0  # bytes of the closing tag that stand at the end of the thought
        self._has_tool_calls = False
        self._limit = limit_of(prompt.request.constraint)
        self._usage = Usage(
            prompt_tokens=len(prompt.request.prompt_token_ids),
            thinking_budget=None if self._limit is None else self._limit.budget,
            task_reasoning_tokens=None if prompt.task is None else prompt.task.num_thought_tokens,
        )
        self.is_finished = False

    def read(self, output: Output) -> list[StreamItem]:
        """What an output of the engine amounts to.

        Raises:
            EngineError: it says that the request failed.
            RequestError: it failed by its own fault.
        """
        if output.request_error is not None:
            raise output.request_error
        if output.finish_reason == "error" or output.error is not None:
            raise EngineError(output.error or "the engine failed while running this request")
        reason = output.finish_reason
        if reason == "abort" and output.stop_reason == "deadline":
            self._check_deadline(len(output.token_ids))
            reason = "length"
        num_tokens = len(output.token_ids)
        # What ends an answer within a burst must not depend on how long the burst is: nothing behind it counts.
        size = 1 if self._may_end_early else max(1, num_tokens)
        text_ids: tuple[int, ...] = ()
        num_hidden = 0
        items: list[StreamItem] = []
        for begin in range(0, max(1, num_tokens), size):
            is_last = begin + size >= num_tokens
            part = output.token_ids[begin : begin + size]
            self._count(part, output.stats)
            shown = part
            if reason == "stop" and is_last:
                while shown and shown[-1] in self._eos_token_ids:
                    shown = shown[:-1]
                num_hidden = len(part) - len(shown)
            text_ids += shown
            items += self._read(shown, output.logprobs[begin : begin + size], reason if is_last else None)
            if self.is_finished:
                break
        end = len(text_ids)
        logprobs, stop_logprobs = output.logprobs[:end], output.logprobs[end : end + num_hidden]
        return [Progress(text_ids, logprobs, self._usage, output.prompt_logprobs, stop_logprobs), *items]

    def _read(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], reason: FinishReason | None
    ) -> Iterator[StreamItem]:
        """The events of some more tokens, the last ones if there is a reason."""
        text = self._text(token_ids, logprobs)
        if reason is not None:
            text += self._detokenizer.flush()
        yield from self._shown([*self._given_events(), *self._parser.push(text)], "stop")
        if reason is not None and not self.is_finished:
            yield from self._shown(self._parser.finish(reason), reason)

    def _shown(self, events: Sequence[Event], reason: FinishReason) -> Iterator[StreamItem]:
        """Events with stop strings and the limit of calls applied; a call that ends here does so for that reason."""
        for event in events:
            if isinstance(event, ReasoningDelta):
                yield event
                continue
            for shown in self._filter(event, reason):
                yield from self._text_logprobs(shown)
                yield shown
            if self.is_finished:
                return

    def _given_events(self) -> list[Event]:
        """What the given beginning amounts to, once: no text, which is the client's own, but calls that it opens."""
        given, self._pending_prefill = self._pending_prefill, ""
        events = self._parser.push(given) if given else []
        return [event for event in events if not isinstance(event, ReasoningDelta)]

    def _text(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> str:
        if self._places is None:
            return self._detokenizer.push(token_ids)
        texts = []
        for token_id, token in zip(token_ids, logprobs, strict=False):
            texts.append(self._detokenizer.push((token_id,)))
            self._places.add(token, texts[-1])
        return "".join([*texts, self._detokenizer.push(token_ids[len(texts) :])])

    def _text_logprobs(self, event: Event) -> Sequence[TextLogprobs]:
        if self._places is None:
            return ()
        found = TextLogprobs()
        if isinstance(event, ContentDelta):
            found = self._places.take(event)
        elif isinstance(event, Finish):
            found = self._places.take_all()
        return (found,) if found.other or found.content else ()

    def _check_deadline(self, num_new_tokens: int) -> None:
        """The time is over: what there is becomes the answer, cut; without any of it there is none to give."""
        if not self._usage.completion_tokens + num_new_tokens:
            seconds = self._prompt.request.deadline_seconds or 1.0
            raise QueueFull(f"no token came within the {seconds:g} seconds that this request had", seconds)
        self._usage = replace(self._usage, deadline_reached=True)

    def _filter(self, event: Event, reason: FinishReason) -> Iterator[Event]:
        if isinstance(event, ContentDelta):
            # A part may be given text that could have become a tag. Stop strings are looked for in what is new.
            begin, num_given = event.end - len(event.text), len(self._prompt.prefill)
            new = event.text[num_given - begin :] if begin < num_given else event.text
            text, found = self._stop.push(new)
            self._content_end = event.end
            if text:
                yield ContentDelta(text, event.end - self._stop.num_unshown)
            if found:
                yield self._finish("stop", found)
            return
        if not isinstance(event, ReasoningDelta) and (held := self._stop.flush()):
            yield ContentDelta(held, self._content_end)
        if isinstance(event, ToolCallStart):
            self._has_tool_calls = True
        if isinstance(event, Finish):
            yield self._finish(event.reason)
            return
        yield event
        limit = self._prompt.max_tool_calls
        if isinstance(event, ToolCallEnd) and limit is not None and event.index + 1 >= limit:
            yield self._finish(reason)

    def _finish(self, reason: FinishReason, stop_string: str | None = None) -> Finish:
        self.is_finished = True
        return Finish("tool_calls" if reason == "stop" and self._has_tool_calls else reason, stop_string)

    def _count(self, token_ids: tuple[int, ...], stats: RequestStats | None) -> None:
        was_reasoning = self._is_reasoning
        num_reasoning = self._num_reasoning(token_ids) if was_reasoning else 0
        usage = self._usage
        task_reasoning_tokens, thinking_cut = usage.task_reasoning_tokens, usage.thinking_cut
        if task_reasoning_tokens is not None:
            task_reasoning_tokens += num_reasoning
        if was_reasoning and not self._is_reasoning and self._limit is not None:
            thinking_cut = self._limit.cut
        # Every output comes by here; `replace` would take twice the time.
        self._usage = Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens + len(token_ids),
            reasoning_tokens=usage.reasoning_tokens + num_reasoning,
            cached_tokens=usage.cached_tokens if stats is None else stats.num_cached_tokens,
            drafted_tokens=usage.drafted_tokens if stats is None else sum(stats.num_drafted_tokens),
            accepted_draft_tokens=(
                usage.accepted_draft_tokens if stats is None else sum(stats.num_accepted_tokens)
            ),
            num_steps=usage.num_steps if stats is None else stats.num_steps,
            queue_seconds=usage.queue_seconds if stats is None else stats.queue_seconds,
            thinking_budget=usage.thinking_budget,
            thinking_cut=thinking_cut,
            task_reasoning_tokens=task_reasoning_tokens,
            deadline_reached=usage.deadline_reached,
        )

    def _num_reasoning(self, token_ids: tuple[int, ...]) -> int:
        """How many of these tokens belong to the thought and its closing tag. Tokens decide, not events: those come
        when the parser knows more."""
        for count, token_id in enumerate(token_ids, 1):
            self._end_progress = advance(self._end_progress, self._token_bytes(token_id))
            if self._end_progress == len(THINK_END):
                self._is_reasoning = False
                return count
        return len(token_ids)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
