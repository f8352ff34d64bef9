"""The terminal chat: in a pseudo-terminal with a scripted engine, and its parts alone."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from stepflash.chat.messages import (
    ContentDelta,
    Finish,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from stepflash.engine.request import SamplingParams
from stepflash.terminal.chat import AnswerPrinter, TerminalChat
from tests.scripted_engine import END, engine_of, scripted_session

ROOT = Path(__file__).parents[2]
CTRL_C, CTRL_D = b"\x03", b"\x04"
SCRIPT = """
from stepflash.engine.request import SamplingParams
from stepflash.terminal.chat import run_chat
from tests.scripted_engine import END, scripted_session
session = scripted_session("hm\\n</think>\\nfirst" + END, "hm\\n</think>\\n" + "word " * 2000, bursts=[3], pause=0.01)
run_chat(session, SamplingParams(max_tokens=None), model_name="scripted")
print("left in order")
"""


class Terminal:
    """A program in a pseudo-terminal of 24 rows and 80 columns."""

    def __init__(self, folder: Path) -> None:
        self._leader, follower = pty.openpty()
        os.set_blocking(self._leader, False)
        environment = {
            **os.environ,
            "TERM": "xterm",
            "XDG_STATE_HOME": str(folder),
            "COLUMNS": "80",
            "LINES": "24",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(follower)
        self.output = ""

    def send(self, data: bytes) -> None:
        os.write(self._leader, data)

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Read until `text` appears; returns what came before it and with it."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output!r}"
            if select.select([self._leader], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self._leader, 65536).decode("utf-8", "replace")
                except OSError:  # the program has ended
                    assert text in self.output, f"no {text!r} in {self.output!r}"
        return self._take(text)

    def interrupt_until(self, text: str) -> str:
        """Press Ctrl-C at the prompt until `text` appears.

        Once is not always enough: Python may miss a signal that comes just before readline starts to wait for keys.
        """
        for _ in range(20):
            self.send(CTRL_C)
            deadline = time.monotonic() + 3.0
            while text not in self.output and time.monotonic() < deadline:
                if select.select([self._leader], [], [], 0.1)[0]:
                    self.output += os.read(self._leader, 65536).decode("utf-8", "replace")
            if text in self.output:
                return self._take(text)
        raise AssertionError(f"no {text!r} in {self.output!r}")

    def _take(self, text: str) -> str:
        end = self.output.index(text) + len(text)
        seen, self.output = self.output[:end], self.output[end:]
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


def _take_terminal() -> None:
    """Make the terminal on standard input the controlling one, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    fcntl.ioctl(0, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


def test_a_whole_chat_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("> ")
    terminal.send(b"hello\r")
    answer = terminal.wait_for("> ")
    assert "hm" in answer
    assert "first" in answer
    assert "drafts a step" in answer
    assert "\033[1;23r" in answer, "the last row is kept for the status"
    assert "\033[r" in answer[answer.rindex("\033[1;23r") :], "and given back"

    terminal.send(b"go on\r")
    terminal.wait_for("word word")
    terminal.send(CTRL_C)
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    assert terminal.process.poll() is None, "Ctrl-C stops the answer, not the program"

    terminal.interrupt_until("/quit or Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.send(b"/reste\r")
    terminal.wait_for("did you mean '/reset'?")
    terminal.send(b"/reset\r")
    terminal.wait_for("forgotten")
    terminal.send(b"hello again\r")
    terminal.wait_for("drafts a step")
    terminal.wait_for("> ")
    terminal.send(CTRL_D)
    terminal.wait_for("left in order")
    assert terminal.process.wait(timeout=30) == 0
    history = (tmp_path / "stepflash" / "chat_history").read_text()
    assert history.split("\n")[:2] == ["hello", "go on"]


# The parts


def chat_with(
    *texts: str, lines: list[str], sampling: SamplingParams | None = None
) -> tuple[str, TerminalChat]:
    """Run a chat over the lines; returns what it wrote on standard output."""
    output = io.StringIO()
    chat = TerminalChat(
        session=scripted_session(*texts),
        sampling=sampling or SamplingParams(max_tokens=None),
        model_name="scripted",
        console=Console(file=output),
    )
    rest = iter(lines)

    def read_line(_: str) -> str:
        for line in rest:
            return line
        raise EOFError

    chat.run(read_line)
    return output.getvalue(), chat


def test_the_conversation_grows_and_resets() -> None:
    texts = ("t1\n</think>\none" + END, "t2\n</think>\ntwo" + END)
    output, chat = chat_with(*texts, lines=["a", "/system Be kind.", "b", "line one\\", "line two"])
    assert output == "<think>\nt1\n</think>\none\n<think>\nt2\n</think>\ntwo\n<think>\nt1\n</think>\none\n"
    assert [(m.role, m.content) for m in chat.messages] == [
        ("user", "b"),
        ("assistant", "two"),
        ("user", "line one\nline two"),
        ("assistant", "one"),
    ]
    last = engine_of(chat.session).requests[-1]
    prompt = chat.session.tokenizer.decode(last.prompt_token_ids)
    assert "system\nBe kind.<|im_end|>" in prompt
    assert "a<|im_end|>" not in prompt


def test_thinking_can_be_switched_off() -> None:
    _, chat = chat_with("x" + END, lines=["/think", "a"])
    prompt = chat.session.tokenizer.decode(engine_of(chat.session).requests[0].prompt_token_ids)
    assert prompt.endswith("<think>\n\n</think>\n")


def test_an_error_keeps_the_chat_alive(capsys: pytest.CaptureFixture[str]) -> None:
    _, chat = chat_with("x" + END, lines=["word " * 1000, "short"])
    assert "error: prompt is too long" in capsys.readouterr().err
    assert [message.content for message in chat.messages] == ["short", "x"] or chat.messages[
        0
    ].content == "short"


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    output = io.StringIO()
    printer = AnswerPrinter(Console(file=output))
    printer.show(ContentDelta("a\033[2Jb\x07\x9bc\td\n[bold]e[/bold]"))
    printer.end()
    assert output.getvalue() == "a\ufffd[2Jb\ufffd\ufffdc\td\n[bold]e[/bold]\n"


def test_kinds_of_text_are_set_apart() -> None:
    output = io.StringIO()
    printer = AnswerPrinter(Console(file=output))
    events = (
        ReasoningDelta("th"),
        ReasoningDelta("ought"),
        ContentDelta("text"),
        ToolCallStart(0, "c1", "weather"),
        ToolCallArguments(0, '{"city": "Oslo"}'),
        ToolCallEnd(0),
        Finish("tool_calls"),
    )
    for event in events:
        printer.show(event)
    printer.end()
    assert output.getvalue() == '<think>\nthought\n</think>\ntext\nweather {"city": "Oslo"}\n'
