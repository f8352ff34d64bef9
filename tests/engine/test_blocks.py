"""The block pool against a dictionary of counts (brute force, hypothesis)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.engine.blocks import BlockPool, OutOfBlocks


@given(st.lists(st.tuples(st.sampled_from("ahr"), st.integers(0, 5)), max_size=60))
def test_any_sequence_of_calls_agrees_with_plain_counts(calls: list[tuple[str, int]]) -> None:
    pool = BlockPool(8)
    holders: list[list[int]] = []
    for kind, number in calls:
        held = {i for ids in holders for i in ids}
        if kind == "a":
            if number > 8 - len(held):
                with pytest.raises(OutOfBlocks):
                    pool.allocate(number)
                continue
            taken = pool.allocate(number)
            assert len(set(taken)) == number
            assert not held & set(taken)  # disjoint from everything that is held
            holders.append(taken)
        elif kind == "h" and holders:
            shared = list(holders[number % len(holders)])
            pool.hold(shared)
            holders.append(shared)
        elif kind == "r" and holders:
            pool.release(holders.pop(number % len(holders)))
        pool.check_integrity(holders)
        assert pool.num_used == len({i for ids in holders for i in ids})


def test_the_integrity_check_finds_leaks_and_surprises() -> None:
    pool = BlockPool(3)
    taken = pool.allocate(2)
    with pytest.raises(AssertionError, match="counted, held"):
        pool.check_integrity([taken[:1]])
    with pytest.raises(AssertionError, match="counted, held"):
        pool.check_integrity([taken, taken])
    pool.release(taken)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(taken[:1])
