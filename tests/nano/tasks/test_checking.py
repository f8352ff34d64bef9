"""Only the right answer passes. Kind: hand-made cases, and agreement with the output parser."""

from __future__ import annotations

from random import Random

import pytest

from stepflash.chat.messages import (
    ContentDelta,
    Message,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)
from stepflash.chat.parser import OutputParser
from stepflash.nano.tasks import Example, check, completion, sample, turns

QUESTION = Message(role="user", content="q")
PLAIN = Example(
    task="x", tier="easy", messages=(QUESTION, Message(role="assistant", content="12", reasoning="7+5=12"))
)
CALL = Example(
    task="x",
    tier="easy",
    messages=(
        QUESTION,
        Message(
            role="assistant", reasoning="f", tool_calls=(ToolCall(name="f", arguments={"a": 1, "b": "x y"}),)
        ),
    ),
)
CALL_TEXT = (
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n"
    "<parameter=b>\nx y\n</parameter>\n</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("7+5=12\n</think>\n12<|im_end|>", True),
        ("something else\n</think>\n12", True),
        ("</think>12", True),
        ("7+5=12\n</think>\n13", False),
        ("12", False),
        ("12\n</think>\n", False),
        ("\n</think>\n12" + CALL_TEXT, False),
        ("", False),
    ],
)
def test_plain_answers(text: str, right: bool) -> None:
    assert check(PLAIN, text) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (f"f\n</think>\n{CALL_TEXT}<|im_end|>", True),
        (f"f\n</think>\n{CALL_TEXT.replace('=f', '=g')}", False),
        (f"f\n</think>\n{CALL_TEXT.replace('x y', 'x z')}", False),
        (f"f\n</think>\n{CALL_TEXT.replace('parameter=b', 'parameter=c')}", False),
        (f"f\n</think>\n{CALL_TEXT}{CALL_TEXT}", False),
        (f"f\n</think>\nHere: {CALL_TEXT}", False),
        ("f\n</think>\n", False),
    ],
)
def test_calls(text: str, right: bool) -> None:
    assert check(CALL, text) is right


def test_events() -> None:
    assert check(PLAIN, [ReasoningDelta("t"), ContentDelta("1"), ContentDelta("2")])
    assert not check(PLAIN, [ReasoningDelta("12")])
    start = ToolCallStart(0, "id", "f")
    assert check(CALL, [start, ToolCallArguments(0, '{"a": 1, '), ToolCallArguments(0, '"b": "x y"}')])
    assert not check(CALL, [start, ToolCallArguments(0, '{"a": 2, "b": "x y"}')])
    assert not check(CALL, [start])


def test_agrees_with_the_output_parser() -> None:
    rng = Random(4)
    for _ in range(100):
        for step in turns(sample(rng, rng.random())):
            stream = OutputParser(tools=step.tools, in_reasoning=True)
            events = [*stream.push(completion(step.target)), *stream.finish("stop")]
            assert check(step, events)
