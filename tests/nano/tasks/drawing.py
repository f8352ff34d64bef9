"""Examples for the tests of this folder."""

from __future__ import annotations

from random import Random

from stepflash.nano.tasks import TASKS, Example, Tier

TIERS: tuple[Tier, ...] = ("easy", "hard")


def draw(task: str, count: int = 150) -> list[Example]:
    """`count` examples of each tier, as the generator makes them."""
    rng = Random(f"test {task}")
    return [TASKS[task][0](rng, tier) for tier in TIERS for _ in range(count)]


def question(example: Example) -> str:
    return example.messages[0].content


def thought(example: Example) -> str:
    reasoning = example.target.reasoning
    assert reasoning
    return reasoning


def answer(example: Example) -> str:
    return example.target.content
