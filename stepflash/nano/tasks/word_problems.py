"""Word problems of one to three steps.

A problem is a text with holes and a list of steps; a step names the operation in words (`buys more`) and then works
it out digit by digit. Steps refer to the running value, so a problem reads and is solved from left to right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from stepflash.nano.tasks.arithmetic import operate
from stepflash.nano.tasks.example import Example, Tier, single_turn
from stepflash.nano.tasks.pools import PEOPLE, THINGS


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the running value: a sentence, the thought about it, and how the value changes."""

    sentences: tuple[str, ...]
    thought: str
    operator: str


BEGINNINGS = (
    "{name} has {n} {things}.",
    "There are {n} {things} in the box of {name}.",
    "{name} starts with {n} {things}.",
    "{name} owns {n} {things}.",
    "{name} collected {n} {things}.",
)
STEPS = (
    Step(("{name} buys {n} more.", "{name} gets {n} more.", "{name} finds {n} more {things}."), "more", "+"),
    Step(("{friend} gives {name} {n} {things}.", "{friend} brings {n} more {things}."), "gets", "+"),
    Step(("{name} gives {n} to {friend}.", "{name} gives {friend} {n} of them."), "gives", "-"),
    Step(("{name} loses {n}.", "{name} sells {n} of them.", "Then {n} {things} break."), "fewer", "-"),
    Step(("{friend} takes {n} {things}.", "{friend} takes away {n}."), "takes", "-"),
    Step(("Then the number of {things} doubles.", "{name} doubles them."), "double", "*"),
    Step(("{name} shares them equally between {n} people and keeps one share.",), "share", "/"),
)
ENDINGS = (
    "How many {things} does {name} have now?",
    "How many {things} are left for {name}?",
    "How many {things} does {name} have in the end?",
)


def word_problem(rng: Random, tier: Tier) -> Example:
    """Small numbers and 1 or 2 steps (easy), numbers up to 200 and 2 or 3 steps (hard)."""
    question, thoughts, answer = rng.choice((_story, _story, *SITUATIONS))(rng, tier)
    return single_turn("word_problem", tier, question, "\n".join(thoughts), str(answer))


Problem = tuple[str, list[str], int]


def _limit(tier: Tier) -> int:
    return 40 if tier == "easy" else 200


def _story(rng: Random, tier: Tier) -> Problem:
    name, friend = rng.sample(PEOPLE, 2)
    things, limit = rng.choice(THINGS), _limit(tier)
    value = rng.randint(2, limit)
    sentences = [rng.choice(BEGINNINGS).format(name=name, n=value, things=things)]
    thoughts = []
    for _ in range(rng.choice((1, 1, 2)) if tier == "easy" else rng.choice((2, 3))):
        step = rng.choice(STEPS)
        if step.operator == "*":
            number = 2
        elif step.operator == "/":
            divisors = [n for n in range(2, 10) if value % n == 0 and value]
            if not divisors:
                step, number = STEPS[0], rng.randint(1, limit)
            else:
                number = rng.choice(divisors)
        elif step.operator == "-":
            if value < 2:
                step, number = STEPS[0], rng.randint(1, limit)
            else:
                number = rng.randint(1, value - 1)
        else:
            number = rng.randint(1, limit)
        sentences.append(rng.choice(step.sentences).format(name=name, friend=friend, n=number, things=things))
        lines, value = operate(value, step.operator, number)
        thoughts += [step.thought, *lines]
    sentences.append(rng.choice(ENDINGS).format(name=name, things=things))
    return " ".join(sentences), thoughts, value


def _groups(rng: Random, tier: Tier) -> Problem:
    groups, each = rng.randint(2, 9), rng.randint(2, 12 if tier == "easy" else 90)
    things = rng.choice(THINGS)
    holder = rng.choice(("boxes", "bags", "rows", "baskets", "shelves"))
    question = rng.choice(
        (
            f"There are {groups} {holder} with {each} {things} each. How many {things} are there?",
            f"Each of {groups} {holder} holds {each} {things}. How many {things} is that in total?",
            f"{rng.choice(PEOPLE)} fills {groups} {holder} with {each} {things} each. How many {things} altogether?",
        )
    )
    lines, value = operate(groups, "*", each)
    thoughts = ["each", *lines]
    if tier == "hard":
        extra = rng.randint(2, 90)
        question = question.replace(". ", f". There are {extra} more on the floor. ", 1)
        lines, value = operate(value, "+", extra)
        thoughts += ["more", *lines]
    return question, thoughts, value


def _share(rng: Random, tier: Tier) -> Problem:
    people, each = rng.randint(2, 9), rng.randint(2, 9 if tier == "easy" else 60)
    things, total = rng.choice(THINGS), people * each
    question = rng.choice(
        (
            f"{total} {things} are shared equally by {people} children. How many does each get?",
            f"{rng.choice(PEOPLE)} packs {total} {things} into {people} equal boxes. How many are in each box?",
            f"Divide {total} {things} among {people} friends. How many {things} does each friend get?",
        )
    )
    lines, value = operate(total, "/", people)
    return question, ["share", *lines], value


def _shopping(rng: Random, tier: Tier) -> Problem:
    price, count = rng.randint(2, 9), rng.randint(2, 9 if tier == "easy" else 40)
    things, name = rng.choice(THINGS), rng.choice(PEOPLE)
    lines, cost = operate(price, "*", count)
    thoughts = ["cost", *lines]
    text = rng.choice(
        (
            f"{name} buys {count} {things} for {price} dollars each.",
            f"One of the {things} costs {price} dollars. {name} buys {count}.",
        )
    )
    if rng.random() < 0.5:
        return f"{text} How much does {name} pay?", thoughts, cost
    paid = cost + rng.randint(1, 30)
    lines, value = operate(paid, "-", cost)
    return (
        f"{text} {name} pays with {paid} dollars. How much change is it?",
        [*thoughts, "change", *lines],
        value,
    )


def _compare(rng: Random, tier: Tier) -> Problem:
    name, friend = rng.sample(PEOPLE, 2)
    things, small, gap = rng.choice(THINGS), rng.randint(2, _limit(tier)), rng.randint(1, _limit(tier))
    kind = rng.randrange(3)
    if kind == 0:
        lines, value = operate(small, "+", gap)
        text = f"{name} has {small} {things}. {friend} has {gap} more. How many {things} does {friend} have?"
        return text, ["more", *lines], value
    if kind == 1:
        lines, value = operate(small + gap, "-", gap)
        text = f"{name} has {small + gap} {things}. {friend} has {gap} fewer. How many {things} does {friend} have?"
        return text, ["fewer", *lines], value
    lines, value = operate(small + gap, "-", small)
    text = f"{name} has {small + gap} {things} and {friend} has {small}. How many more does {name} have?"
    return text, ["difference", *lines], value


def _together(rng: Random, tier: Tier) -> Problem:
    name, friend, third = rng.sample(PEOPLE, 3)
    things = rng.choice(THINGS)
    first, second, last = (rng.randint(2, _limit(tier)) for _ in range(3))
    lines, value = operate(first, "+", second)
    thoughts = ["together", *lines]
    if tier == "easy" or rng.random() < 0.3:
        text = (
            f"{name} has {first} {things} and {friend} has {second}. How many {things} do they have together?"
        )
        return text, thoughts, value
    text = f"{name} has {first} {things}, {friend} has {second} and {third} has {last}. How many {things} in total?"
    lines, value = operate(value, "+", last)
    return text, [*thoughts, *lines], value


def _travel(rng: Random, tier: Tier) -> Problem:
    speed, hours = rng.randint(2, 12) * (10 if tier == "hard" else 1), rng.randint(2, 9)
    name = rng.choice(PEOPLE)
    verb = rng.choice(("walks", "drives", "rides", "runs"))
    lines, value = operate(speed, "*", hours)
    text = f"{name} {verb} {speed} km every hour. How far does {name} get in {hours} hours?"
    return text, ["each", *lines], value


def _reading(rng: Random, tier: Tier) -> Problem:
    per_day, days = rng.randint(2, 9 if tier == "easy" else 40), rng.randint(2, 9)
    name = rng.choice(PEOPLE)
    lines, read = operate(per_day, "*", days)
    pages = read + rng.randint(1, 60)
    text = f"A book has {pages} pages. {name} reads {per_day} pages a day for {days} days. How many pages are left?"
    rest_lines, value = operate(pages, "-", read)
    return text, ["each", *lines, "left", *rest_lines], value


SITUATIONS: tuple[Callable[[Random, Tier], Problem], ...] = (
    _groups,
    _share,
    _shopping,
    _compare,
    _together,
    _travel,
    _reading,
)
