"""Loops in thoughts: against a search through the whole list (brute force), and what must not count as one."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.assistant.loops import (
    MAX_PERIOD,
    MIN_REFRAINS,
    MIN_REPEATED_TOKENS,
    MIN_REPEATS,
    REFRAIN_TOKENS,
    REFRAIN_WINDOW,
    LoopDetector,
)


def first_loop(tokens: Sequence[int]) -> int | None:
    """How many tokens are read when the detector says so."""
    detector = LoopDetector()
    num_free = 0
    for count, token_id in enumerate(tokens, start=1):
        num_free = max(num_free - 1, detector.num_free)
        detector.accept(token_id)
        # What was free at any time before completes no loop.
        assert num_free <= 0 or not detector.is_looping
        if detector.is_looping:
            return count
    return None


def has_period(tokens: Sequence[int]) -> bool:
    """By definition: the end of the list is some phrase, often enough."""
    for period in range(1, MAX_PERIOD + 1):
        length = max(MIN_REPEATS * period, MIN_REPEATED_TOKENS)
        end = tokens[len(tokens) - length :]
        if len(tokens) >= length and all(end[i] == end[i - period] for i in range(period, length)):
            return True
    return False


@pytest.mark.parametrize("period", [1, 2, 7, 40, 64, 65, 200, MAX_PERIOD])
def test_a_period_is_found_as_soon_as_it_is_one(period: int) -> None:
    draw = random.Random(period)
    before = [draw.randrange(1000) for _ in range(77)]
    phrase = [1000 + i for i in range(period)]
    tokens = before + phrase * (2 + max(MIN_REPEATS, MIN_REPEATED_TOKENS // period + 1))
    found = first_loop(tokens)
    expected = next(n for n in range(len(tokens)) if has_period(tokens[:n]))
    assert found == expected == len(before) + max(MIN_REPEATS * period, MIN_REPEATED_TOKENS)


def test_a_refrain_is_found_whatever_stands_between() -> None:
    draw = random.Random(1)
    refrain = [5000 + i for i in range(REFRAIN_TOKENS)]

    def tokens(gap: int) -> list[int]:
        between = [[draw.randrange(1000) for _ in range(gap)] for _ in range(MIN_REFRAINS)]
        return [token_id for part in between for token_id in (*part, *refrain)]

    near = REFRAIN_WINDOW // MIN_REFRAINS - REFRAIN_TOKENS
    assert first_loop(tokens(near)) == MIN_REFRAINS * (near + REFRAIN_TOKENS)
    assert first_loop(tokens(REFRAIN_WINDOW // 4)) is None


def test_honest_repetition_is_no_loop() -> None:
    draw = random.Random(2)
    table = [
        token_id for row in range(200) for token_id in (124, 900 + row % 7, 124, draw.randrange(9999), 10)
    ]
    dashes = [45] * (MIN_REPEATED_TOKENS - 1) + list(range(100))
    draft = [3000 + i for i in range(300)] * (MIN_REPEATS - 1)
    for tokens in (table, dashes * 3, draft, [draw.randrange(50) for _ in range(5000)]):
        assert first_loop(tokens) is None


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_any_walk_forward_and_back_sees_what_a_straight_one_sees(seed: int) -> None:
    """Few tokens and a phrase that comes again and again, so that loops come and go with the steps."""
    draw = random.Random(seed)
    kinds = draw.choice([3, 50])
    phrase = [draw.randrange(kinds) for _ in range(draw.randint(1, REFRAIN_TOKENS))] * 40
    detector = LoopDetector()
    tokens: list[int] = []
    for _ in range(80):
        if draw.random() < 0.3 and tokens:
            count = min(len(tokens), draw.choice([1, 3, 30, 90]))
            detector.rollback(count)
            del tokens[len(tokens) - count :]
        else:
            for token_id in phrase[: draw.choice([1, 5, 60])] if draw.random() < 0.9 else [draw.randrange(3)]:
                detector.accept(token_id)
                tokens.append(token_id)
        assert detector.is_looping == (first_loop(tokens) is not None)
