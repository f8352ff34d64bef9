"""Blocks of the KV cache: who holds which, counted.

A block is a row of the cache tensors, `block_size` slots long. It may be held several times, by sequences and
by the prefix cache; it is free when nobody holds it. Invariant: a block is on the free list if and only if its
count is zero, so `check_integrity` can prove at any moment that nothing leaked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """Fewer free blocks than asked for; the scheduler evicts, preempts or waits. Never leaves the engine."""


class BlockPool:
    """`num_blocks` blocks with reference counts. Ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each held once.

        Raises:
            OutOfBlocks: and nothing was taken.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} free")
        taken = [self._free.pop() for _ in range(count)]
        for block_id in taken:
            self._counts[block_id] = 1
        return taken

    def hold(self, block_ids: Iterable[int]) -> None:
        """Hold blocks that somebody holds already."""
        for block_id in block_ids:
            assert self._counts[block_id] > 0, f"block {block_id} is free and cannot be shared"
            self._counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Let go of blocks once each; those that nobody holds any more are free."""
        for block_id in block_ids:
            count = self._counts[block_id]
            assert count > 0, f"block {block_id} was released more often than held"
            self._counts[block_id] = count - 1
            if count == 1:
                self._free.append(block_id)

    def num_holders(self, block_id: int) -> int:
        return self._counts[block_id]

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Compare the counts with everyone who says to hold blocks.

        Raises:
            AssertionError: a block is leaked, held by surprise, or both free and held.
        """
        expected = Counter(block_id for held in holders for block_id in held)
        wrong = {i: (n, expected[i]) for i, n in enumerate(self._counts) if n != expected[i]}
        assert not wrong, f"block counts (counted, held): {wrong}"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert free == {i for i, n in enumerate(self._counts) if n == 0}, "free list and counts disagree"
