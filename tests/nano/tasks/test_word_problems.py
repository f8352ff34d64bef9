"""Word problems, solved a second time from their text. Kind: brute force."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.nano.tasks.drawing import answer, draw, question, thought
from tests.nano.tasks.test_arithmetic import assert_true

GAINS = r"buys (\d+) more|gets (\d+) more|finds (\d+) more|gives [A-Z]\w+ (\d+) \w+\.|brings (\d+) more"
LOSSES = (
    r"gives (\d+) to|gives [A-Z]\w+ (\d+) of them|loses (\d+)|sells (\d+)"
    r"|Then (\d+) \w+ break|takes (?:away )?(\d+)"
)


def solve_story(text: str) -> int:
    """Read a story sentence by sentence."""
    first, *changes, _ = re.split(r"(?<=\.) ", text)
    value = int(re.findall(r"\d+", first)[0])
    for sentence in changes:
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if "doubl" in sentence:
            value *= 2
        elif "shares them equally" in sentence:
            value //= numbers[0]
        elif re.search(LOSSES, sentence):
            value -= numbers[0]
        else:
            assert re.search(GAINS, sentence), sentence
            value += numbers[0]
    return value


def test_stories() -> None:
    stories = [
        e for e in draw("word_problem", 600) if re.search(r"have now|are left for|in the end", question(e))
    ]
    assert len(stories) > 100
    for example in stories:
        assert int(answer(example)) == solve_story(question(example)), question(example)


def test_situations() -> None:
    rules: dict[str, Callable[..., int]] = {
        r"(\d+) \w+ are shared equally by (\d+)": lambda a, b: a // b,
        r"packs (\d+) \w+ into (\d+)": lambda a, b: a // b,
        r"Divide (\d+) \w+ among (\d+)": lambda a, b: a // b,
        r"(\d+) km every hour.*in (\d+) hours": lambda a, b: a * b,
        r"(\d+) \w+ with (\d+) \w+ each\. How": lambda a, b: a * b,
        r"(\d+) \w+ with (\d+) \w+ each\. There are (\d+) more": lambda a, b, c: a * b + c,
        r"Each of (\d+) \w+ holds (\d+) \w+\. How": lambda a, b: a * b,
        r"has (\d+) pages.* (\d+) pages a day for (\d+) days": lambda a, b, c: a - b * c,
        r"has (\d+) \w+ and [A-Z]\w+ has (\d+)\. How many \w+ do they": lambda a, b: a + b,
        r"has (\d+) \w+, [A-Z]\w+ has (\d+) and [A-Z]\w+ has (\d+)": lambda a, b, c: a + b + c,
        r"has (\d+) \w+ and [A-Z]\w+ has (\d+)\. How many more": lambda a, b: a - b,
        r"has (\d+) \w+\. [A-Z]\w+ has (\d+) more\. How": lambda a, b: a + b,
        r"has (\d+) \w+\. [A-Z]\w+ has (\d+) fewer": lambda a, b: a - b,
        r"buys (\d+) \w+ for (\d+) dollars each\. .* pays with (\d+)": lambda a, b, c: c - a * b,
        r"buys (\d+) \w+ for (\d+) dollars each\. How": lambda a, b: a * b,
        r"costs (\d+) dollars\. [A-Z]\w+ buys (\d+)\. How": lambda a, b: a * b,
    }
    met = set()
    for example in draw("word_problem", 600):
        for pattern, rule in rules.items():
            if match := re.search(pattern, question(example)):
                numbers = [int(number) for number in match.groups() if number]
                assert int(answer(example)) == rule(*numbers), question(example)
                met.add(pattern)
    assert met == set(rules)


def test_thoughts_are_true() -> None:
    for example in draw("word_problem"):
        lines = [
            line for line in thought(example).split("\n") if any(character.isdigit() for character in line)
        ]
        assert_true(lines)
        assert lines[-1].endswith(answer(example))
