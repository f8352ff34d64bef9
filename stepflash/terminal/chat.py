"""The chat in a terminal: read a line, stream the answer, keep the conversation.

Ctrl-C stops the answer and keeps what was said; Ctrl-D or /quit ends the program. While an answer runs, the
last row of the terminal shows its speed. Where standard output is no terminal, only the text is written, so
the chat also works in a pipe: one line in is one turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from stepflash.assistant.budget import NO_THOUGHT, Thinking
from stepflash.assistant.session import Session
from stepflash.assistant.stream import Fold, Progress, StreamItem, Usage
from stepflash.chat.messages import (
    ContentDelta,
    Conversation,
    Message,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from stepflash.engine.request import SamplingParams
from stepflash.errors import StepflashError
from stepflash.settings import did_you_mean

HELP = """\
/reset         forget the conversation
/think         switch thinking off or on again
/system TEXT   set the system message and forget the conversation
/quit          leave (also Ctrl-D)
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""
COMMANDS = ("/help", "/reset", "/think", "/system", "/quit", "/exit")
STATUS_SECONDS = 0.1
THOUGHT_STYLE, CALL_STYLE = "2;3", "1"  # dim italic and bold, as terminals number them
_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class AnswerPrinter:
    """Writes stream items as they come: the thought dim, the answer plain, tool calls bold."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._kind: type | None = None
        self._at_line_start = True

    def show(self, item: StreamItem) -> None:
        match item:
            case ReasoningDelta(text):
                self._begin(ReasoningDelta)
                self._write(text, THOUGHT_STYLE)
            case ContentDelta(text):
                self._begin(ContentDelta)
                self._write(text)
            case ToolCallStart(_, _, name):
                self._begin(ToolCallStart)
                self._write(f"{name} ", CALL_STYLE)
            case ToolCallArguments(_, fragment):
                self._write(fragment, CALL_STYLE)
            case ToolCallEnd():
                self._end_line()

    def end(self) -> None:
        self._end_line()

    def _begin(self, kind: type) -> None:
        """Start a new paragraph where the kind of text changes; mark the thought where colour cannot."""
        if kind is self._kind:
            return
        is_plain = not self._console.is_terminal
        if self._kind is not None:
            self._end_line()
            if self._kind is ReasoningDelta:
                self._write("</think>\n" if is_plain else "\n")
        elif kind is ReasoningDelta and is_plain:
            self._write("<think>\n")
        self._kind = kind

    def _end_line(self) -> None:
        if not self._at_line_start:
            self._write("\n")

    def _write(self, text: str, codes: str = "") -> None:
        # What a model writes must not steer the terminal, so control characters are replaced. Not through
        # rich, which would turn tabs into spaces.
        text = text.translate(_CONTROL)
        if text:
            is_styled = codes and self._console.is_terminal
            self._console.file.write(f"\033[{codes}m{text}\033[0m" if is_styled else text)
            self._console.file.flush()
            self._at_line_start = text.endswith("\n")


class StatusLine:
    """Keeps the last row of the terminal for one line of text while other text scrolls above it.

    Uses the terminal's scrolling region; does nothing where there is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._is_active = console.is_terminal and not console.is_dumb_terminal
        self._rows = 0
        self._shown_at = 0.0

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows:
            # Save the cursor, undo the region, clear the row, restore the cursor.
            self._file.write(f"\0337\033[r\033[{self._rows};1H\033[2K\0338")
            self._file.flush()

    def show(self, text: str) -> None:
        now = time.monotonic()
        if not self._is_active or now - self._shown_at < STATUS_SECONDS:
            return
        self._shown_at = now
        columns, rows = os.get_terminal_size(self._file.fileno())
        if rows < 4:
            return
        if rows != self._rows:
            # No region; one row down and up, which scrolls if we are in the last row; then the region, whose
            # side effect on the cursor is undone by saving and restoring it.
            self._file.write(f"\0337\033[r\0338\033D\033[A\0337\033[1;{rows - 1}r\0338")
            self._rows = rows
        self._file.write(f"\0337\033[{rows};1H\033[2K\033[2m{text[: columns - 1]}\033[0m\0338")
        self._file.flush()


@dataclass(slots=True)
class Speed:
    """Tokens per second, accepted drafts a step and cached prompt tokens of one answer, in half a line."""

    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None

    def describe(self, usage: Usage) -> str:
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
        parts = [f"{usage.completion_tokens} tokens"]
        if (decoding := now - self.first_token) > 0 and usage.completion_tokens > 1:
            parts.append(f"{(usage.completion_tokens - 1) / decoding:.1f} tok/s")
        if usage.num_steps and usage.drafted_tokens:
            parts.append(f"{usage.accepted_draft_tokens / usage.num_steps:.2f} drafts a step")
        if usage.cached_tokens:
            parts.append(f"{usage.cached_tokens}/{usage.prompt_tokens} cached")
        parts.append(f"first after {self.first_token - self.started:.2f} s")
        return ", ".join(parts)


@dataclass(slots=True)
class TerminalChat:
    """A conversation with one session in one terminal."""

    session: Session
    sampling: SamplingParams
    model_name: str
    console: Console
    system: str | None = None
    is_thinking: bool = True
    messages: list[Message] = field(default_factory=list)

    def run(self, read_line: Callable[[str], str]) -> None:
        """Read and answer until the input ends. `read_line(prompt)` raises EOFError at its end."""
        self._note(f"{self.model_name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        with asyncio.Runner() as runner:
            while True:
                try:
                    text = _read_turn(read_line)
                except EOFError:
                    return
                except KeyboardInterrupt:
                    self._note("\n/quit or Ctrl-D leaves")
                    continue
                if text.startswith("/"):
                    if not self._command(text):
                        return
                elif text.strip():
                    self._turn(runner, text)

    def _turn(self, runner: asyncio.Runner, text: str) -> None:
        self.messages.append(Message(role="user", content=text))
        collected = Fold()
        speed = Speed()
        try:
            runner.run(self._answer(collected, speed))
        except KeyboardInterrupt:
            self._note("stopped")
        except StepflashError as error:
            self.messages.pop()
            self._note(f"error: {error}")
            return
        answer = collected.answer()
        self.messages.append(answer.to_message())
        if answer.usage.completion_tokens and self.console.is_terminal:
            self._note(speed.describe(answer.usage))
        if answer.finish_reason == "length":
            self._note("the answer was cut: it reached its token limit")

    async def _answer(self, collected: Fold, speed: Speed) -> None:
        head = (Message(role="system", content=self.system),) if self.system else ()
        prompt = self.session.prepare(
            Conversation(messages=(*head, *self.messages)),
            self.sampling,
            thinking=Thinking() if self.is_thinking else NO_THOUGHT,
        )
        printer = AnswerPrinter(self.console)
        try:
            with StatusLine(self.console) as status:
                async with aclosing(self.session.answer(prompt)) as stream:
                    async for item in stream:
                        collected.add(item)
                        if isinstance(item, Progress):
                            status.show(speed.describe(item.usage))
                        printer.show(item)
        finally:
            printer.end()

    def _command(self, text: str) -> bool:
        """Run a command; False ends the chat."""
        name, _, argument = text.strip().partition(" ")
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._note(HELP)
            case "/reset":
                self.messages.clear()
                self._note("the conversation is forgotten")
            case "/think":
                self.is_thinking = not self.is_thinking
                self._note(f"thinking is {'on' if self.is_thinking else 'off'}")
            case "/system":
                self.system = argument.strip() or None
                self.messages.clear()
                self._note("the system message is set" if self.system else "there is no system message now")
            case _:
                self._note(f"there is no command {name}{did_you_mean(name, COMMANDS)} (/help lists them)")
        return True

    def _note(self, text: str) -> None:
        """Say something that is not the model's: on standard error where the output is not a terminal."""
        console = self.console if self.console.is_terminal else Console(stderr=True)
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def run_chat(
    session: Session,
    sampling: SamplingParams,
    *,
    model_name: str,
    system: str | None = None,
    is_thinking: bool = True,
) -> None:
    """Chat on standard input and output."""
    console = Console()
    chat = TerminalChat(
        session=session,
        sampling=sampling,
        model_name=model_name,
        console=console,
        system=system,
        is_thinking=is_thinking,
    )
    if sys.stdin.isatty() and console.is_terminal:
        with _history():
            chat.run(lambda prompt: input(prompt))
    else:
        chat.run(lambda _: _read_plain_line())


def _read_plain_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _read_turn(read_line: Callable[[str], str]) -> str:
    """One turn of the user; a line that ends with a backslash goes on."""
    lines = [read_line("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(". "))
    return "\n".join(lines)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with a history that outlives the program, where the platform has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "stepflash"
    file = folder / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
