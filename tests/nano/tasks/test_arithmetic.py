"""Every line of every trace is true, and the answer is what Python computes. Kind: brute force, property."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.nano.tasks.arithmetic import operate
from tests.nano.tasks.drawing import answer, draw, question, thought

EQUATION = re.compile(r"([-0-9+*/()]+)=([-0-9+*()]+)( r(\d+))?( >(\d+))?")
WORDS = {"plus": "+", "minus": "-", "times": "*", "divided by": "/", "x": "*"}


def assert_true(lines: list[str]) -> None:
    """Each line is a heading `12+34:` or an equation that holds; after `>` stand true digits of the result."""
    result: int | None = None
    from_left = False
    for line in lines:
        if line.endswith(":"):
            result, from_left = int(eval(line[:-1])), "/" in line
            continue
        match = EQUATION.fullmatch(line)
        assert match, f"not an equation: {line!r}"
        left, right, _, rest, _, known = match.groups()
        if rest is None:
            assert eval(left) == eval(right), line
        else:
            part, divisor = map(int, left.split("/"))
            assert divmod(part, divisor) == (int(right), int(rest)), line
        if known:
            assert result is not None
            padded = str(result).rjust(len(known), "0")
            assert (padded.startswith if from_left else padded.endswith)(known), line


@given(st.integers(0, 99999), st.sampled_from("+-"), st.integers(0, 99999))
def test_sums_and_differences(left: int, operator: str, right: int) -> None:
    lines, value = operate(left, operator, right)
    assert value == eval(f"{left}{operator}{right}")
    assert_true(lines)
    assert lines[-1].endswith(str(value))


@given(st.integers(0, 99999), st.integers(0, 99))
def test_products(left: int, right: int) -> None:
    for first, second in ((left, right), (right, left)):
        lines, value = operate(first, "*", second)
        assert value == left * right
        assert_true(lines)
        assert lines[-1].endswith(str(value))


@given(st.integers(0, 99999), st.integers(1, 99))
def test_quotients(quotient: int, divisor: int) -> None:
    lines, value = operate(quotient * divisor, "/", divisor)
    assert value == quotient
    assert_true(lines)
    assert lines[-1].endswith(str(value))


@pytest.mark.parametrize(("left", "operator", "right"), [(7, "/", 2), (7, "/", 0), (-1, "+", 2), (1, "^", 2)])
def test_what_has_no_trace_is_refused(left: int, operator: str, right: int) -> None:
    with pytest.raises(ValueError):
        operate(left, operator, right)


@pytest.mark.parametrize("task", ["add", "subtract", "multiply", "divide", "expression"])
def test_examples_ask_for_what_they_answer(task: str) -> None:
    for example in draw(task):
        text = question(example)
        for word, operator in WORDS.items():
            text = text.replace(f" {word} ", f" {operator} ")
        text = re.sub(r"[A-Za-z?]|\.$|= ", " ", text.replace("x", "*")).strip()
        assert int(answer(example)) == eval(text), question(example)
        lines = thought(example).split("\n")
        assert_true(lines)
        assert lines[-1].endswith(answer(example))
