"""What the model wrote, to the stream of events that every wire format encodes.

The parser tells thought from answer and leaves the answer to `ToolCallParser`. Its invariant: the events, joined
by `join_events`, depend on the text alone, never on how it was cut into pieces; so a burst of several tokens, a
single token and the whole output at once are the same to it, and `parse` is the fold of the same stream.

Rules of thought, for a prompt that ends with `<think>`, newline (`in_reasoning`):
  * Everything is thought up to the first `</think>`, or to the end if there is none. One newline before the tag
    and one after it belong to the tag.
  * A model may open its thought once more. If `<think>` begins within the first characters (`LOOKAHEAD_CHARS`,
    held back until that is decided), what stands before it is content, unless it is only whitespace.
  * A thought that ends with tool calls, nothing but whitespace after them, and never with `</think>`, is an answer
    whose closing tag was forgotten: the calls are made. If `</think>` or other text follows, the model was only
    thinking about calls, and they stay part of the thought. Until then they are held back. A call that the
    length limit cut off is not made. While there are tools, only calls of those count.
Without `in_reasoning` the text is content until a `<think>`, if there is one outside of a call; the thought ends
as above. Any later `<think>` or `</think>` is content.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum, auto

from stepflash.chat.messages import (
    ContentDelta,
    Event,
    Finish,
    FinishReason,
    ParsedMessage,
    ReasoningDelta,
    Tool,
    fold_events,
    join_events,
)
from stepflash.chat.tool_calls import ToolCallParser, declared_tools, new_call_id
from stepflash.chat.tool_tags import NeedMore, TagReader

THINK_START, THINK_END = "<think>", "</think>"
LOOKAHEAD_CHARS = 32

_FIRST_TAG = re.compile("<think>|</think>|<tool_call>|<function")


class _Phase(Enum):
    OPENING = auto()  # before it is clear whether the model opens its thought once more
    REASONING = auto()
    CALLS = auto()  # calls inside a thought that may be unfinished
    CONTENT = auto()


class OutputParser:
    """Incremental parser of one answer."""

    def __init__(
        self,
        tools: Sequence[Tool] | None = (),
        in_reasoning: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """
        Args:
            tools: the tools of the request. With none, well-formed calls are still recognised and their arguments
                are text. None switches the search for calls off.
            in_reasoning: whether the prompt ended inside an open `<think>`.
            new_id: makes the identifiers of calls.
        """
        self._declared = None if tools is None else declared_tools(tools)
        self._new_id = new_id
        self._phase = _Phase.OPENING if in_reasoning else _Phase.CONTENT
        self._content = ToolCallParser(
            self._declared, new_id=new_id, stop_tag=None if in_reasoning else THINK_START
        )
        # Holds the text that is not decided yet, and recognises calls inside a thought.
        self._reader = TagReader(self._declared or {}, any_function=not tools)
        self._position = 0
        self._num_chars = 0  # of input
        self._content_start = 0  # characters of input in front of the content's own
        self._events: list[Event] = []
        self._skips_newline = False
        self._newline = ""  # a trailing newline of the thought: the closing tag's, if nothing else follows
        self._calls = self._content
        self._calls_text: list[str] = []
        self._calls_events: list[Event] = []
        self._num_calls_in_thought = 0

    @property
    def in_reasoning(self) -> bool:
        """Whether the next text is thought, as far as is known."""
        return self._phase is not _Phase.CONTENT

    def push(self, text: str) -> list[Event]:
        """The events that `text` completes; text that could still become part of a tag is held back."""
        reader = self._reader
        has_nothing_held = text and not reader.text and not self._skips_newline
        reader.text += text
        self._num_chars += len(text)
        # Nearly all text comes by these two short cuts; they do what `_run` would.
        if has_nothing_held and self._phase is _Phase.CONTENT:
            self._content_step()
            if self.in_reasoning:
                return self._run()
        elif has_nothing_held and self._phase is _Phase.REASONING and "<" not in text:
            self._write_reasoning(text)
        else:
            return self._run()
        reader.text, self._position = "", 0
        events, self._events = self._events, []
        return events

    def finish(self, reason: FinishReason) -> list[Event]:
        """The remaining events, the last of them `Finish`: with reason "tool_calls" instead of "stop" if there
        were calls. Call it once, after the last text."""
        self._reader.at_end = True
        events = self._run()
        if self._phase is _Phase.CALLS:
            events += self._finish_calls(is_whole=reason == "stop")
        elif self._phase is _Phase.CONTENT:
            events += self._placed(self._content.finish(is_whole=reason == "stop"))
        has_calls = self._content.num_calls + self._num_calls_in_thought > 0
        events.append(Finish("tool_calls" if has_calls and reason == "stop" else reason))
        return join_events(events)

    def _run(self) -> list[Event]:
        steps = {
            _Phase.OPENING: self._opening_step,
            _Phase.REASONING: self._reasoning_step,
            _Phase.CALLS: self._calls_step,
            _Phase.CONTENT: self._content_step,
        }
        reader = self._reader
        try:
            while self._position < len(reader.text):
                if self._skips_newline:
                    self._skips_newline = False
                    if reader.text[self._position] == "\n":
                        self._position += 1
                        continue
                steps[self._phase]()
        except NeedMore:
            pass
        reader.text = reader.text[self._position :]
        self._position = 0
        events, self._events = self._events, []
        return join_events(events)

    def _opening_step(self) -> None:
        text = self._reader.text
        tag = _FIRST_TAG.search(text)
        if tag is None and not self._reader.at_end and len(text) < LOOKAHEAD_CHARS + len(THINK_START):
            raise NeedMore
        if tag is not None and tag[0] == THINK_START and tag.start() <= LOOKAHEAD_CHARS:
            before = text[: tag.start()]
            if before.strip():
                self._events.append(ContentDelta(before, self._num_read + tag.start()))
            self._position = tag.end()
            self._skips_newline = True
        self._phase = _Phase.REASONING

    def _reasoning_step(self) -> None:
        reader, start = self._reader, self._position
        tag = reader.text.find("<", start)
        if tag != start:
            self._position = len(reader.text) if tag < 0 else tag
            self._write_reasoning(reader.text[start : self._position])
        elif reader.is_at(start, THINK_END):
            self._position += len(THINK_END)
            self._phase, self._skips_newline, self._newline = _Phase.CONTENT, True, ""
        elif self._declared is not None and reader.opening(start) is not None:
            self._phase = _Phase.CALLS
            self._calls = ToolCallParser(
                self._declared,
                new_id=self._new_id,
                first_index=self._content.num_calls,
                stops_at_content=True,
            )
            self._calls_text, self._calls_events = [], []
        else:
            self._write_reasoning("<")
            self._position += 1

    def _write_reasoning(self, text: str) -> None:
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if text:
            self._events.append(ReasoningDelta(text))

    def _calls_step(self) -> None:
        """Try to read the rest as calls; as soon as that fails, all of it was thought."""
        reader = self._reader
        text = reader.text[self._position :]
        self._position = len(reader.text)
        searched = (self._calls_text[-1] if self._calls_text else "") + text
        close = searched.find(THINK_END)
        if close < 0:
            # The last piece stays long enough to hold an unfinished closing tag.
            self._calls_text[-1:] = [searched[: 1 - len(THINK_END)], searched[1 - len(THINK_END) :]]
            self._calls_events += self._calls.push(text)
            if not self._calls.has_stopped:
                return
            num_chars = self._calls.last_call_end
        else:
            num_chars = sum(len(part) for part in self._calls_text[:-1]) + close
            self._calls_text[-1:] = [searched]
        everything = "".join(self._calls_text)
        reader.text, self._position = everything[num_chars:], 0
        self._phase = _Phase.REASONING
        self._write_reasoning(everything[:num_chars])

    def _finish_calls(self, *, is_whole: bool) -> list[Event]:
        is_cut = self._calls.is_in_call and not is_whole
        events = self._calls_events + self._calls.finish(is_whole=is_whole)
        if is_cut or self._calls.has_stopped:
            self._write_reasoning("".join(self._calls_text))
            return self._events
        self._num_calls_in_thought = self._calls.num_calls - self._content.num_calls
        return events

    def _content_step(self) -> None:
        text = self._reader.text[self._position :]
        self._content_start = self._num_read - self._content.num_chars
        self._position = len(self._reader.text)
        self._events += self._placed(self._content.push(text))
        if self._content.has_stopped:
            self._reader.text, self._position = self._content.take_rest(), 0
            self._phase, self._skips_newline = _Phase.REASONING, True

    @property
    def _num_read(self) -> int:
        """Characters of input up to the position."""
        return self._num_chars - len(self._reader.text) + self._position

    def _placed(self, events: Sequence[Event]) -> list[Event]:
        """Events of the content, with places in the whole input."""
        start = self._content_start
        return [
            ContentDelta(event.text, start + event.end) if isinstance(event, ContentDelta) else event
            for event in events
        ]


def parse(
    text: str,
    tools: Sequence[Tool] | None = (),
    in_reasoning: bool = True,
    reason: FinishReason = "stop",
    new_id: Callable[[], str] = new_call_id,
) -> ParsedMessage:
    """A whole output at once: the fold of the same events."""
    parser = OutputParser(tools, in_reasoning, new_id)
    return fold_events([*parser.push(text), *parser.finish(reason)])
