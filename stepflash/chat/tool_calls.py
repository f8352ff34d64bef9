"""Answer text, as it arrives, to pieces of content and tool calls.

Four states: content, inside a function, inside a parameter's value, after a function. Every decision is taken
by `TagReader`, which answers only when more text cannot change the answer, so the events depend on the text
alone and not on how it was cut into pieces.

What is decided here once, for all wire formats:
  * Parameters that are text by their schema stream as they arrive; others are passed on when they are complete.
  * `</parameter>` ends a value only when the call goes on or ends behind it, and a whole call inside a value is
    part of it, so that a value may talk about tool calls. Without `</parameter>` a value ends at the next declared
    parameter, at `</function>` or at the end.
  * A call that lacks tags, or has them misspelt, is mended and marked `repaired` (see `TagReader.header`). Of a
    parameter given twice the first counts. A call whose closing tags the model left out is closed as it stands.
  * A call that a limit cut off is not closed: its arguments stay unfinished JSON and it has no `ToolCallEnd`, so that
    nobody takes half a command for a whole one.
  * Whitespace alone before, between and after calls is no content.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from stepflash.chat.arguments import Typing, convert_to_json, to_json, typings
from stepflash.chat.messages import (
    ContentDelta,
    Event,
    Tool,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    join_events,
)
from stepflash.chat.tool_tags import (
    CALL_END,
    CALL_START,
    CLOSING_TAGS,
    FUNCTION_END,
    PARAMETER_END,
    Declared,
    NeedMore,
    TagReader,
)


def new_call_id() -> str:
    """A random identifier in the style of OpenAI's."""
    return f"call_{secrets.token_hex(12)}"


def declared_tools(tools: Sequence[Tool]) -> Declared:
    """The typings of the parameters of each tool."""
    return {tool.name: typings(tool.parameters) for tool in tools}


@dataclass(slots=True)
class _Call:
    """The call that is being read."""

    index: int
    wrapped: bool
    typings: Mapping[str, Typing]
    repaired: bool
    keys: set[str] = field(default_factory=set)


class _Value:
    """The value of one parameter, turned into JSON text as it arrives."""

    def __init__(self, typing: Typing) -> None:
        self._typing = typing
        self._newline = ""  # a trailing newline is the tag's if nothing follows it
        self._waiting = ""  # text that may not be passed on yet
        self._is_open = False  # the quote of a string has been written

    def push(self, text: str) -> str:
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if self._is_open:
            return to_json(text)[1:-1]
        self._waiting += text
        if not self._typing.is_text or "null".startswith(self._waiting.lower()):
            return ""
        self._is_open = True
        return to_json(self._waiting)[:-1]

    def finish(self) -> str:
        return '"' if self._is_open else convert_to_json(self._waiting, self._typing)


class ToolCallParser:
    """Splits answer text into content and tool calls."""

    def __init__(
        self,
        declared: Declared | None,
        *,
        new_id: Callable[[], str] = new_call_id,
        first_index: int = 0,
        stop_tag: str | None = None,
        stops_at_content: bool = False,
    ) -> None:
        """`declared` None means that no calls are looked for. `stop_tag`, where it stands in content, stops the
        parser: `has_stopped` becomes true and `take_rest` gives the text behind it. `stops_at_content` stops it at
        any content that is not whitespace; it stands behind `last_call_end`."""
        self._reader = TagReader(declared or {}, any_function=True)
        self._finds_calls = declared is not None
        self._new_id = new_id
        self._stop_tag = stop_tag
        self._stops_at_content = stops_at_content
        self._step = self._content_step
        self._position = 0
        self.num_chars = 0  # of input
        self._events: list[Event] = []
        self._blank: str | None = ""  # whitespace so far, while there is nothing else since the last call
        self._orphans: frozenset[str] = frozenset()  # closing tags of a call that was closed without them
        self._call = _Call(index=-1, wrapped=False, typings={}, repaired=False)
        self._key: str | None = None
        self._num_quoted_calls = 0  # calls that have begun inside the value
        self._value = _Value(Typing())
        self.num_calls = first_index
        self.has_stopped = False
        self._is_cut = False  # the output ended where a limit was, not where the model did
        self.last_call_end = 0  # characters of input up to the end of the last complete call

    @property
    def is_in_call(self) -> bool:
        """Whether a call has begun whose function is not closed."""
        return self._step in (self._function_step, self._value_start_step, self._value_step)

    def push(self, text: str) -> list[Event]:
        self.num_chars += len(text)
        reader = self._reader
        is_held = reader.text or self.has_stopped or not text
        reader.text += text
        # Nearly all text comes by this short cut; it does what `_run` would.
        if not is_held and "<" not in text and self._step == self._content_step:
            self._position = len(text)
            self._write_content(text)
            reader.text, self._position = "", 0
            events, self._events = self._events, []
            return events
        return self._run()

    def finish(self, *, is_whole: bool = True) -> list[Event]:
        """The events that the end of the output decides; `is_whole`: the model ended it."""
        self._reader.at_end = True
        self._is_cut = not is_whole
        events = self._run()
        if self._blank and not self.num_calls:
            events.append(ContentDelta(self._blank, self._num_read))
        return join_events(events)

    def take_rest(self) -> str:
        """After `has_stopped`: the text behind the stop tag. The parser goes on without a stop tag."""
        rest = self._reader.text
        self._reader.text, self._stop_tag, self.has_stopped, self._blank = "", None, False, ""
        return rest

    def _run(self) -> list[Event]:
        reader = self._reader
        try:
            while not self.has_stopped and (
                self._position < len(reader.text) or self._is_unfinished_at_end()
            ):
                self._step()
        except NeedMore:
            pass
        reader.text = reader.text[self._position :]
        self._position = 0
        events, self._events = self._events, []
        return join_events(events)

    @property
    def _num_read(self) -> int:
        """Characters of input up to the position."""
        return self.num_chars - len(self._reader.text) + self._position

    def _is_unfinished_at_end(self) -> bool:
        return self._reader.at_end and self._step != self._content_step

    def _content_step(self) -> None:
        reader, start = self._reader, self._position
        tag = reader.text.find("<", start)
        if tag != start:
            self._position = len(reader.text) if tag < 0 else tag
            self._write_content(reader.text[start : self._position])
            return
        if self._stop_tag is not None and reader.is_at(start, self._stop_tag):
            self._position += len(self._stop_tag)
            self.has_stopped = True
            return
        for orphan in self._orphans:
            if reader.is_at(start, orphan):
                self._orphans -= {orphan}
                self._position += len(orphan)
                return
        opening = reader.opening(start) if self._finds_calls else None
        if opening is not None:
            self._blank, self._orphans = "", frozenset()
            self._call = _Call(
                index=self.num_calls,
                wrapped=opening.wrapped,
                typings=reader.declared.get(opening.name, {}),
                repaired=opening.repaired,
            )
            self.num_calls += 1
            self._events.append(ToolCallStart(self._call.index, self._new_id(), opening.name))
            self._position, self._step = opening.end, self._function_step
        elif self._finds_calls and reader.is_at(start, CALL_START) and self._is_cut_header(start):
            self._position = len(reader.text)
        else:
            self._position += 1
            self._write_content("<")

    def _is_cut_header(self, start: int) -> bool:
        """Whether the output ends inside the header of a call that has begun: no content, and no call."""
        header = self._reader.after_space(start + len(CALL_START))
        return header < len(self._reader.text) and self._reader.is_over(header)

    def _write_content(self, text: str) -> None:
        if self._blank is not None:
            text = self._blank + text
            if text.isspace():
                self._blank = text
                return
            self._blank = None
        if self._stops_at_content:
            self.has_stopped = True
            return
        self._events.append(ContentDelta(text, self._num_read))

    def _function_step(self) -> None:
        reader = self._reader
        tag = reader.after_space(self._position)
        if reader.is_over(tag):
            self._end_of_output()
        elif reader.is_at(tag, FUNCTION_END):
            self._position, self._step = tag + len(FUNCTION_END), self._function_end_step
        elif reader.is_at(tag, CALL_END):
            self._end_call(tag + len(CALL_END), is_complete=False)
        elif reader.is_at(tag, PARAMETER_END):
            self._call.repaired = True
            self._position = tag + len(PARAMETER_END)
        elif header := reader.header(tag, "parameter", self._call.typings, any_name=True):
            self._call.repaired |= header.repaired
            self._begin_value(header.name)
            self._position, self._step = header.end, self._value_start_step
        else:
            self._orphans = frozenset(CLOSING_TAGS)
            self._end_call(self._position, is_complete=False)

    def _begin_value(self, key: str) -> None:
        call = self._call
        if key in call.keys:
            call.repaired, self._key = True, None
            return
        self._key = key
        self._value = _Value(call.typings.get(key, Typing()))
        self._write_arguments(("{" if not call.keys else ", ") + to_json(key) + ": ")
        call.keys.add(key)

    def _value_start_step(self) -> None:
        """One newline behind the header belongs to the tag."""
        if self._reader.text.startswith("\n", self._position):
            self._position += 1
        self._num_quoted_calls = 0
        self._step = self._value_step

    def _value_step(self) -> None:
        reader, start = self._reader, self._position
        tag = reader.text.find("<", start)
        if tag != start:
            self._position = len(reader.text) if tag < 0 else tag
            if start < self._position:
                self._write_value(reader.text[start : self._position])
            elif self._is_cut:
                self._end_of_output()
            elif reader.at_end:
                self._end_value(start, is_complete=False)
            return
        if self._is_cut and reader.is_over(start):
            self._end_of_output()
            return
        if reader.is_at(start, CALL_START) and reader.opening(start) is not None:
            self._num_quoted_calls += 1
        elif self._num_quoted_calls:
            self._num_quoted_calls -= reader.is_at(start, CALL_END)
        elif reader.is_at(start, PARAMETER_END):
            if self._goes_on(reader.after_space(start + len(PARAMETER_END))):
                self._end_value(start + len(PARAMETER_END), is_complete=True)
                return
        elif self._ends_unclosed(start):
            self._end_value(start, is_complete=False)
            return
        self._write_value("<")
        self._position += 1

    def _goes_on(self, position: int) -> bool:
        """Whether what stands behind `</parameter>` shows that it was the tag and not part of the value."""
        reader = self._reader
        return (
            reader.is_over(position)
            or reader.is_at(position, FUNCTION_END)
            or reader.is_at(position, CALL_END)
            or reader.header(position, "parameter", self._call.typings, any_name=True) is not None
            or reader.opening(position) is not None
        )

    def _ends_unclosed(self, position: int) -> bool:
        """Whether the tag at `position` ends a value that has no `</parameter>`."""
        reader, call = self._reader, self._call
        header = reader.header(position, "parameter", call.typings, any_name=not call.typings)
        if header is not None:
            return header.name not in call.keys
        if reader.is_at(position, FUNCTION_END):
            behind = reader.after_space(position + len(FUNCTION_END))
            return (
                self._model_ended(behind)
                or reader.is_at(behind, CALL_END)
                or reader.opening(behind) is not None
            )
        if reader.is_at(position, CALL_END):
            behind = reader.after_space(position + len(CALL_END))
            return self._model_ended(behind) or reader.opening(behind) is not None
        return reader.text.startswith("</", position) and reader.is_over(position)

    def _model_ended(self, position: int) -> bool:
        return self._reader.is_over(position) and not self._is_cut

    def _write_value(self, text: str) -> None:
        if self._key is not None:
            self._write_arguments(self._value.push(text))

    def _end_value(self, end: int, *, is_complete: bool) -> None:
        if self._key is not None:
            self._write_arguments(self._value.finish())
        self._call.repaired |= not is_complete
        self._position, self._step = end, self._function_step

    def _write_arguments(self, fragment: str) -> None:
        if fragment:
            self._events.append(ToolCallArguments(self._call.index, fragment))

    def _function_end_step(self) -> None:
        reader = self._reader
        tag = reader.after_space(self._position)
        if reader.is_over(tag):
            self._end_call(len(reader.text), is_complete=False)
        elif reader.is_at(tag, CALL_END):
            self._end_call(tag + len(CALL_END), is_complete=self._call.wrapped)
        else:
            self._orphans = frozenset({CALL_END})
            self._end_call(self._position, is_complete=False)

    def _end_of_output(self) -> None:
        """Inside a call: the model forgot its closing tags, or was cut off."""
        if not self._is_cut:
            self._end_call(len(self._reader.text), is_complete=False)
            return
        if not self._call.keys:
            self._write_arguments("{")  # nothing would be read as no arguments
        self._position, self._step = len(self._reader.text), self._content_step

    def _end_call(self, end: int, *, is_complete: bool) -> None:
        call = self._call
        self._write_arguments("}" if call.keys else "{}")
        self._events.append(ToolCallEnd(call.index, repaired=call.repaired or not is_complete))
        self._position, self._step, self._blank = end, self._content_step, ""
        self.last_call_end = self._num_read
