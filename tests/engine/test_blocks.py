"""The block pool against a dictionary of counts (brute force, hypothesis)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.engine.blocks import BlockPool, OutOfBlocks


@given(st.lists(st.tuples(st.sampled_from("ahrkd"), st.integers(0, 5)), max_size=80))
def test_any_sequence_of_calls_agrees_with_plain_counts(calls: list[tuple[str, int]]) -> None:
    pool = BlockPool(8)
    holders: list[list[int]] = []
    keepers: list[list[int]] = []
    for kind, number in calls:
        owned = [*holders, *keepers]
        used = {i for ids in owned for i in ids}
        if kind == "a":
            if number > 8 - len(used):
                with pytest.raises(OutOfBlocks):
                    pool.allocate(number)
                continue
            taken = pool.allocate(number)
            assert len(set(taken)) == number
            assert not used & set(taken)  # disjoint from everything that is held or kept
            holders.append(taken)
        elif kind == "h" and owned:
            shared = list(owned[number % len(owned)])
            pool.hold(shared)
            holders.append(shared)
        elif kind == "k" and owned:
            shared = list(owned[number % len(owned)])
            pool.keep(shared)
            keepers.append(shared)
        elif kind == "r" and holders:
            pool.release(holders.pop(number % len(holders)))
        elif kind == "d" and keepers:
            pool.drop(keepers.pop(number % len(keepers)))
        pool.check_integrity(holders, keepers)
        held = {i for ids in holders for i in ids}
        kept = {i for ids in keepers for i in ids}
        assert pool.num_used == len(held | kept)
        assert pool.num_cached == len(kept - held)
        assert [pool.is_held(i) for i in range(8)] == [i in held for i in range(8)]


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
    for share in (pool.hold, pool.keep):
        with pytest.raises(AssertionError, match="is free"):
            share(taken[:1])
    with pytest.raises(AssertionError, match="more often than kept"):
        pool.drop(taken[:1])
    (block,) = pool.allocate(1)
    pool.keep([block])
    with pytest.raises(AssertionError, match="counted, kept"):
        pool.check_integrity([[block]])
