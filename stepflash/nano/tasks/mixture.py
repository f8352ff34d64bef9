"""What is trained when: one table of weights, and the draws from it.

`progress` runs from 0 to 1 over the training tokens. Each task has a weight at the start, in the middle and at the
end, interpolated linearly in between; copying and one-step sums come first, tool use and everything else later, and
nothing ever falls below one per cent. The share of hard examples grows as well.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from random import Random

from stepflash.chat.messages import Message
from stepflash.nano.tasks import (
    arithmetic,
    chat,
    copying,
    dates,
    letters,
    lists,
    python_code,
    tool_use,
    word_problems,
)
from stepflash.nano.tasks.example import Example, Generator, Tier, belongs_to_held_out, belongs_to_training

# name: (generator, weight at progress 0, at 0.4, at 1); weights are relative shares of documents
TASKS: dict[str, tuple[Generator, float, float, float]] = {
    "add": (arithmetic.add, 6.0, 2.5, 2.0),
    "subtract": (arithmetic.subtract, 5.0, 2.5, 2.0),
    "multiply": (arithmetic.multiply, 4.0, 3.0, 4.5),
    "divide": (arithmetic.divide, 2.0, 2.0, 4.5),
    "expression": (arithmetic.expression, 1.5, 4.0, 6.0),
    "word_problem": (word_problems.word_problem, 2.0, 9.0, 10.0),
    "sort": (lists.sort_numbers, 3.0, 4.0, 7.5),
    "extreme": (lists.extreme, 3.0, 3.0, 3.0),
    "count_items": (lists.count_items, 3.0, 3.0, 3.0),
    "spell": (letters.spell, 6.0, 3.0, 4.0),
    "count_letter": (letters.count_letter, 2.0, 3.0, 3.0),
    "count_letters": (letters.count_letters, 2.0, 2.0, 2.0),
    "reverse": (letters.reverse, 2.0, 3.0, 4.5),
    "repeat": (copying.repeat, 16.0, 3.0, 3.0),
    "quote": (copying.quote, 5.0, 2.0, 1.5),
    "lookup": (copying.lookup, 9.0, 3.0, 4.5),
    "nth_item": (copying.nth_item, 5.0, 3.0, 2.5),
    "weekday": (dates.weekday, 1.5, 3.0, 3.0),
    "months": (dates.months, 1.5, 2.0, 2.5),
    "days_between": (dates.days_between, 1.5, 2.0, 2.0),
    "date_after": (dates.date_after, 1.5, 2.0, 2.5),
    "leap_year": (dates.leap_year, 1.5, 1.5, 3.5),
    "python_expression": (python_code.python_expression, 2.0, 6.0, 7.5),
    "python_snippet": (python_code.python_snippet, 2.0, 5.0, 6.0),
    "small_talk": (chat.small_talk, 2.0, 3.0, 4.0),
    "introduction": (chat.introduction, 1.5, 1.5, 1.5),
    "fact": (chat.fact, 2.0, 3.0, 4.0),
    "tool_call": (tool_use.tool_call, 3.0, 8.0, 6.0),
    "tool_made_up": (tool_use.tool_made_up, 3.0, 7.0, 4.0),
    "tool_answer": (tool_use.tool_answer, 1.5, 5.0, 5.0),
    "tool_chain": (tool_use.tool_chain, 1.5, 3.5, 4.0),
    "tool_none": (tool_use.tool_none, 1.5, 2.5, 3.5),
}
MIDDLE = 0.4
HARD_SHARE = (0.05, 0.15, 0.25)  # at progress 0, MIDDLE and 1
SYSTEM_SHARE = 0.1  # examples that open with a system message
EARLIER_SHARE = 0.06  # examples with an earlier exchange before the question
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are nano.",
    "Answer briefly.",
    "You are a helpful assistant. Be concise.",
    "You are an assistant with tools.",
    "Think step by step.",
)


def weights(progress: float) -> dict[str, float]:
    """The share of every task at `progress`; they sum to 1."""
    values = {name: _interpolate(row[1:], progress) for name, row in TASKS.items()}
    total = sum(values.values())
    return {name: value / total for name, value in values.items()}


def sample(rng: Random, progress: float) -> Example:
    """Draw a training example."""
    shares = weights(progress)
    name = rng.choices(tuple(shares), cum_weights=tuple(accumulate(shares.values())))[0]
    tier: Tier = "hard" if rng.random() < _interpolate(HARD_SHARE, progress) else "easy"
    return training_example(name, tier, rng)


def training_example(task: str, tier: Tier, rng: Random) -> Example:
    """Draw an example of one task, never one that is reserved for evaluation."""
    while True:
        example = _dress(rng, TASKS[task][0](rng, tier))
        if belongs_to_training(example):
            return example


def held_out(task: str, count: int, tier: Tier = "easy", seed: int = 0) -> list[Example]:
    """`count` evaluation examples with different prompts, none of which training can draw.

    Tasks with few possible prompts (small talk) may give fewer.
    """
    rng = Random(f"held-out {task} {tier} {seed}")
    examples: dict[str, Example] = {}
    for _ in range(200 * count):
        example = TASKS[task][0](rng, tier)
        if belongs_to_held_out(example):
            examples.setdefault(repr((example.prompt, example.tools)), example)
        if len(examples) == count:
            break
    return list(examples.values())


def _dress(rng: Random, example: Example) -> Example:
    """Sometimes put a system message or an earlier exchange before the question."""
    messages = example.messages
    if rng.random() < EARLIER_SHARE:
        earlier = rng.choice((chat.small_talk, chat.fact, chat.introduction, arithmetic.add))(rng, "easy")
        question, answer = earlier.messages
        messages = (question, Message(role="assistant", content=answer.content), *messages)
    if rng.random() < SYSTEM_SHARE:
        messages = (Message(role="system", content=rng.choice(SYSTEM_TEXTS)), *messages)
    return replace(example, messages=messages)


def _interpolate(values: tuple[float, ...], progress: float) -> float:
    """Piecewise linear through `values` at progress 0, MIDDLE and 1."""
    start, middle, end = values
    progress = min(max(progress, 0.0), 1.0)
    if progress < MIDDLE:
        return start + (middle - start) * progress / MIDDLE
    return middle + (end - middle) * (progress - MIDDLE) / (1 - MIDDLE)
