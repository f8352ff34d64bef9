"""Python answers against a separate Python process, thoughts against evaluation. Kind: brute force."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.nano.tasks.drawing import answer, draw, question, thought
from tests.nano.tasks.test_arithmetic import EQUATION

EXPRESSION = re.compile(
    r"What is (.*) in Python\?|What does Python give for (.*)\?|Evaluate in Python: (.*)|Python: (.*)|>>> (.*)"
)


def test_expressions_in_a_fresh_interpreter() -> None:
    examples = draw("python_expression")
    sources = []
    for example in examples:
        match = EXPRESSION.fullmatch(question(example))
        assert match, question(example)
        sources.append(next(filter(None, match.groups())))
    program = "\n".join(f"print(repr({source}))" for source in sources)
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [answer(example) for example in examples]


def test_snippets_in_a_fresh_interpreter() -> None:
    examples = draw("python_snippet", 60)
    program = []
    for example in examples:
        text = re.sub(r"```(python)?", "", question(example))
        lines = [line for line in text.split("\n") if line and not re.match(r"What |Run this", line)]
        program.append("\n".join(lines) + "\nprint('-----')\n")
    done = subprocess.run(
        [sys.executable, "-I", "-c", "".join(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n-----\n")[:-1] == [answer(example) for example in examples]


def test_equations_in_thoughts_hold() -> None:
    checked = 0
    for example in draw("python_expression") + draw("python_snippet"):
        for line in thought(example).split("\n"):
            if (match := EQUATION.fullmatch(line)) and match[3] is None:
                assert eval(match[1]) == eval(match[2]), line
                checked += 1
    assert checked > 200
