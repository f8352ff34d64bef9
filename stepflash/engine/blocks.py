"""Blocks of the KV cache: who holds which, counted.

A block is a row of the cache tensors, `block_size` slots long. Sequences hold blocks, the prefix cache keeps them,
each any number of times; a block is free when nobody does either. What is only kept can be taken back, and
`num_cached` counts it at every moment. Invariant: a block is on the free list if and only if both its counts are
zero, so `check_integrity` can prove at any moment that nothing leaked.
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
        self._held = [0] * num_blocks
        self._kept = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Held or kept."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Kept and not held: free as soon as the prefix cache lets go."""
        return self._num_cached

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each held once.

        Raises:
            OutOfBlocks: and nothing was taken.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} free")
        taken = [self._free.pop() for _ in range(count)]
        for block_id in taken:
            self._held[block_id] = 1
        return taken

    def hold(self, block_ids: Iterable[int]) -> None:
        """A sequence joins those that have these blocks; nothing free can be shared."""
        for block_id in block_ids:
            if self._held[block_id] == 0:
                assert self._kept[block_id] > 0, f"block {block_id} is free and cannot be shared"
                self._num_cached -= 1
            self._held[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """A sequence lets go of blocks, once each."""
        for block_id in block_ids:
            assert self._held[block_id] > 0, f"block {block_id} was released more often than held"
            self._held[block_id] -= 1
            if self._held[block_id] == 0:
                if self._kept[block_id]:
                    self._num_cached += 1
                else:
                    self._free.append(block_id)

    def keep(self, block_ids: Iterable[int]) -> None:
        """The prefix cache joins those that have these blocks."""
        for block_id in block_ids:
            assert self._held[block_id] + self._kept[block_id] > 0, f"block {block_id} is free"
            self._kept[block_id] += 1

    def drop(self, block_ids: Iterable[int]) -> None:
        """The prefix cache lets go of blocks, once each."""
        for block_id in block_ids:
            assert self._kept[block_id] > 0, f"block {block_id} was dropped more often than kept"
            self._kept[block_id] -= 1
            if self._kept[block_id] == 0 and self._held[block_id] == 0:
                self._num_cached -= 1
                self._free.append(block_id)

    def is_held(self, block_id: int) -> bool:
        """By a sequence."""
        return self._held[block_id] > 0

    def check_integrity(
        self, holders: Iterable[Sequence[int]], keepers: Iterable[Sequence[int]] = ()
    ) -> None:
        """Compare the counts with all sequences that say to hold blocks and with what the prefix cache keeps.

        Raises:
            AssertionError: a block is leaked, held by surprise, or both free and held.
        """
        for counts, owners, verb in ((self._held, holders, "held"), (self._kept, keepers, "kept")):
            expected = Counter(block_id for owned in owners for block_id in owned)
            wrong = {i: (n, expected[i]) for i, n in enumerate(counts) if n != expected[i]}
            assert not wrong, f"block counts (counted, {verb}): {wrong}"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        pairs = list(zip(self._held, self._kept, strict=True))
        assert free == {i for i, pair in enumerate(pairs) if pair == (0, 0)}, "free list and counts disagree"
        assert self._num_cached == sum(held == 0 < kept for held, kept in pairs), (
            "blocks only kept: miscounted"
        )
