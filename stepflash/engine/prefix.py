"""The prefix cache: blocks of finished work, found again by their tokens.

A tree whose nodes are blocks of `block_size` tokens, keyed by the tokens themselves, so there are no collisions. A
node holds the full-attention block of its tokens. Full blocks alone cannot continue a sequence: sliding layers need
their last window and the MTP modules the hidden states of the last token. A `Snapshot` holds those; it is kept at
chosen nodes, costs references to blocks that exist anyway, and is what a request can continue from.
Everything here can be evicted, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stepflash.engine.kv_cache import FULL, SLIDING, KVCache
from stepflash.engine.request import CacheLookup

# Evicting takes a walk over old nodes, so it frees a few blocks more than asked for.
EVICTION_SLACK = 32


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What continuing at a block boundary needs beside the full blocks.

    Sliding blocks `block_ids`, the first being number `first` of the sequence; `carries[k - 1]` [1, hidden_size]
    is what module k - 1 (0: the trunk) left at the last token. Without them, modules begin anew behind it.
    """

    first: int
    block_ids: tuple[int, ...]
    carries: tuple[Tensor, ...]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Node:
    """One block of tokens after those of its ancestors; `depth` blocks in all. Roots have no block."""

    token_ids: tuple[int, ...]
    block_id: int
    parent: Node | None
    depth: int
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix that can be continued from; `miss` says in words why it is not longer."""

    num_tokens: int
    full: list[int]
    snapshot: Snapshot | None
    miss: str | None


class PrefixCache:
    """Keeps blocks of the pools on its own account; `KVCache.evict` is this cache's `evict`."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._size = cache.block_size
        self._root = Node((), -1, None, 0)
        self._nodes: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._snapshots: OrderedDict[Node, None] = OrderedDict()
        # Told of every new snapshot; the saver puts itself here.
        self.added: Callable[[Node], None] = lambda node: None
        cache.evict = self.evict

    @property
    def num_blocks(self) -> int:
        return len(self._nodes)

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    def match(self, token_ids: Sequence[int]) -> Match:
        """Longest cached prefix with a snapshot that leaves at least one token to compute."""
        path = self._follow(token_ids)
        usable = (len(token_ids) - 1) // self._size
        found = [node for node in path[:usable] if node.snapshot is not None]
        self._touch(path)
        best = found[-1] if found else None
        num_tokens = best.depth * self._size if best else 0
        if best is not None:
            self._snapshots.move_to_end(best)
        # What is left when all but the last block was found is no miss.
        is_miss = len(token_ids) - num_tokens > self._size
        miss = self._explain(token_ids, path, num_tokens) if is_miss else None
        snapshot = best.snapshot if best else None
        return Match(
            num_tokens, [node.block_id for node in path[: best.depth if best else 0]], snapshot, miss
        )

    def peek(self, token_ids: Sequence[int]) -> CacheLookup:
        """What `match` would find. Changes nothing and iterates over nothing that may change, so any thread may
        ask; the engine goes on meanwhile, so the answer is a good guess."""
        path = self._follow(token_ids)
        usable = (len(token_ids) - 1) // self._size
        depth = max((node.depth for node in path[:usable] if node.snapshot is not None), default=0)
        return CacheLookup(
            num_cached_tokens=depth * self._size,
            num_known_tokens=len(path) * self._size,
            block_size=self._size,
        )

    def insert(self, token_ids: Sequence[int], full: Sequence[int]) -> Node:
        """Remember the full blocks of the first len(full) * block_size tokens; the deepest node."""
        node = self._root
        path = []
        for depth, block_id in enumerate(full, 1):
            key = tuple(token_ids[(depth - 1) * self._size : depth * self._size])
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(key, block_id, node, depth)
                self._cache.pools[FULL].keep((block_id,))
            path.append(child)
            node = child
        self._touch(path)
        return node

    def add_snapshot(
        self, node: Node, first: int, block_ids: Sequence[int], carries: tuple[Tensor, ...]
    ) -> None:
        """Make a node one that requests can continue from."""
        if node.snapshot is None and node.depth:
            self._cache.pools[SLIDING].keep(block_ids)
            node.snapshot = Snapshot(first, tuple(block_ids), carries)
            self._snapshots[node] = None
            self.added(node)

    def evict(self, group: int, count: int) -> None:
        """Give blocks back, least recently used first, until `count` are free or nothing more can go."""
        pool = self._cache.pools[group]
        if group == SLIDING:
            while pool.num_free < count and self._snapshots:
                self._drop_snapshot(next(iter(self._snapshots)))
            return
        for node in list(self._nodes):
            if pool.num_free >= count + EVICTION_SLACK:
                return
            # A block that a sequence also holds would not become free.
            if not node.children and not pool.is_held(node.block_id):
                self._drop(node)

    def clear(self) -> None:
        for node in sorted(self._nodes, key=lambda n: n.depth, reverse=True):
            self._drop(node)

    def snapshots(self) -> list[Node]:
        """The nodes that have one, least recently used first."""
        return list(self._snapshots)

    def keepers(self, group: int) -> Iterator[Sequence[int]]:
        """What this cache keeps in a pool, for the integrity check."""
        if group == FULL:
            yield [node.block_id for node in self._nodes]
        else:
            for node in self._snapshots:
                assert node.snapshot is not None
                yield node.snapshot.block_ids

    def _follow(self, token_ids: Sequence[int]) -> list[Node]:
        """The nodes that match, from the first block on."""
        path: list[Node] = []
        node: Node | None = self._root
        for start in range(0, len(token_ids), self._size):
            node = node.children.get(tuple(token_ids[start : start + self._size])) if node else None
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, path: Sequence[Node]) -> None:
        """Mark a path as used, deepest node first, so that leaves go before what they hang on."""
        for node in reversed(path):
            self._nodes[node] = None
            self._nodes.move_to_end(node)

    def _explain(self, token_ids: Sequence[int], path: Sequence[Node], num_tokens: int) -> str:
        """Why no more than `num_tokens` of this path can be used."""
        at = len(path) * self._size
        rest = token_ids[at : at + self._size]
        parent = path[-1] if path else self._root
        reasons = []
        if parent.children and rest:
            common = max(_common(rest, key) for key in parent.children)
            if common < len(rest):
                reasons.append(f"diverged at token {at + common}")
        # One token must be left to compute, so a window at the very end is of no use.
        usable = min(at, (len(token_ids) - 1) // self._size * self._size)
        if num_tokens < usable:
            reasons.append(f"the windows at tokens {num_tokens + 1} to {usable} are not kept")
        if not reasons and at:
            reasons.append(f"no more than {at} tokens are cached")
        elif not reasons:
            reasons.append("nothing is cached yet")
        return "; ".join(reasons)

    def _drop(self, node: Node) -> None:
        assert node.parent is not None
        self._drop_snapshot(node)
        del node.parent.children[node.token_ids]
        del self._nodes[node]
        self._cache.pools[FULL].drop((node.block_id,))

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self._cache.pools[SLIDING].drop(node.snapshot.block_ids)
            node.snapshot = None
            del self._snapshots[node]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
