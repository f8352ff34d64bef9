"""The table of tasks, the split, and that draws depend on nothing but the seed. Kind: property."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.nano.tasks import (
    TASKS,
    belongs_to_held_out,
    belongs_to_training,
    check,
    completion,
    held_out,
    sample,
    training_example,
    turns,
    weights,
)
from stepflash.nano.tasks.example import Example, is_held_out


def prompt_key(example: Example) -> str:
    queries = [message.content for message in example.messages if message.role == "user"]
    return repr((queries[-1], example.tools))


@given(st.floats(0, 1))
def test_no_task_is_ever_forgotten(progress: float) -> None:
    shares = weights(progress)
    assert shares.keys() == TASKS.keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0.01


def test_tool_use_and_copying_take_their_share() -> None:
    tool_tasks = [name for name in TASKS if name.startswith("tool_")]
    copying = ["repeat", "quote", "lookup", "nth_item"]
    assert sum(weights(0.0)[name] for name in copying) > 0.3
    for progress in (0.4, 0.7, 1.0):
        # A quarter at least: sums and sorting need more than their share at the end.
        assert sum(weights(progress)[name] for name in tool_tasks + copying) >= 0.25


def test_draws_follow_the_table() -> None:
    rng, shares = Random(5), weights(0.7)
    counts = Counter(sample(rng, 0.7).task for _ in range(4000))
    for name, share in shares.items():
        # a binomial count is within 5 standard deviations of its mean
        assert abs(counts[name] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5, name


@settings(max_examples=30)
@given(st.integers(), st.floats(0, 1))
def test_training_never_draws_a_held_out_prompt(seed: int, progress: float) -> None:
    rng = Random(seed)
    for _ in range(30):
        example = sample(rng, progress)
        assert belongs_to_training(example)
        assert not belongs_to_held_out(example)


@pytest.mark.parametrize("task", list(TASKS))
def test_held_out_prompts_are_reserved_and_distinct(task: str) -> None:
    for tier in ("easy", "hard"):
        examples = held_out(task, 20, tier)
        assert len(examples) >= 10
        assert len({prompt_key(example) for example in examples}) == len(examples)
        for example in examples:
            assert belongs_to_held_out(example)
            assert not belongs_to_training(example)
            assert example.task == task
    rng = Random(0)
    trained = {prompt_key(training_example(task, "easy", rng)) for _ in range(300)}
    assert not trained & {prompt_key(example) for example in held_out(task, 50)}


def test_about_a_sixteenth_is_held_out() -> None:
    share = sum(is_held_out(f"question {index}", ()) for index in range(8000)) / 8000
    assert 0.05 < share < 0.075


def test_the_same_seed_draws_the_same() -> None:
    first, second = ([sample(rng, 0.5) for _ in range(50)] for rng in (Random(3), Random(3)))
    assert first == second
    assert held_out("lookup", 5) == held_out("lookup", 5)
    assert held_out("lookup", 5) != held_out("lookup", 5, seed=1)


@pytest.mark.parametrize("task", list(TASKS))
def test_every_turn_has_a_checkable_answer(task: str) -> None:
    for example in held_out(task, 10):
        steps = turns(example)
        assert steps[-1] == example
        for step in steps:
            assert check(step, completion(step.target))
            assert not check(step, completion(step.target).replace("</think>\n", "</think>\nno "))
