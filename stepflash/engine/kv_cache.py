"""The hybrid KV cache: paged blocks for full-attention layers, windows of blocks for sliding ones.

All layers of one kind share block tables. A full layer keeps every block of a sequence; a sliding layer keeps
only the blocks that its window, one block boundary before it (for cache snapshots) and speculation can still
reach. Both tables are indexed by slot // block_size, so one attention op serves both.

MTP module k stores the key of position p in slot p + k, the slot of the token it embeds. Then everything in
slot s depends on tokens 0..s alone, for every layer, and a block whose tokens match can be shared as it is.
The first k slots of module k stay empty (`first_slot`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stepflash.engine.blocks import BlockPool, OutOfBlocks
from stepflash.errors import ConfigError
from stepflash.kernels.kv_layout import is_interleaved, new_kv_cache
from stepflash.model.config import LayerConfig, ModelConfig
from stepflash.model.cost import kv_bytes_per_position

FULL, SLIDING = 0, 1
MAX_MODULES = 3
# Slots beyond the known tokens that one step may write: drafts of the trunk, then those of the modules.
LOOKAHEAD_SLOTS = 2 * MAX_MODULES + 1
SNAPSHOT_SHARE = 0.25
DEFAULT_CAP_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLimits:
    """What the cache must be able to hold; sizes in tokens unless named otherwise.

    `max_deferred_tokens` is how far the MTP modules may lag behind the trunk.
    """

    block_size: int = 16
    max_num_seqs: int
    max_model_len: int
    max_batched_tokens: int
    max_deferred_tokens: int
    num_modules: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """The blocks of one running sequence; `row` is its row in the block tables.

    `sliding[i]` is the block of slots (sliding_first + i) * block_size and up.
    """

    row: int
    full: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)
    sliding_first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """The cache of one layer and what attending over it takes.

    keys, values, and for an int8 cache k_scale, v_scale: rows are blocks, see `kernels.kv_layout`. Slots before
    `first_slot` hold nothing.
    """

    group: int
    window: int | None
    scale: float
    first_slot: int
    keys: Tensor
    values: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def is_native(self) -> bool:
        """Whether the native kernels can use it."""
        return is_interleaved(self.keys)


class KVCache:
    """Layers, pools and tables."""

    def __init__(
        self,
        config: ModelConfig,
        limits: CacheLimits,
        *,
        kv_cache_bytes: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.limits = limits
        self.block_size = limits.block_size
        self.device = torch.device(device)
        self.window = max((w for _, w in _windows(config, limits.num_modules)), default=0)
        self.group_layers = group_layers(config, limits.num_modules)
        self.block_bytes = block_bytes(config, limits)
        self._most_sliding = sliding_blocks_per_sequence(config, limits)
        num_blocks = plan_blocks(config, limits, kv_cache_bytes)
        try:
            self.layers = {
                index: self._new_layer(config, index, group, num_blocks[group])
                for group, indices in enumerate(self.group_layers)
                for index in indices
            }
        except (OSError, OverflowError, torch.OutOfMemoryError) as error:
            size = sum(map(int.__mul__, num_blocks, self.block_bytes)) / 2**30
            raise ConfigError(
                f"kv_cache_bytes: this machine does not give {size:,.1f} GiB for keys and values ({error}); "
                "ask for less"
            ) from error
        self.pools = (BlockPool(num_blocks[FULL]), BlockPool(num_blocks[SLIDING]))
        # Asked to free blocks of a group when a pool runs dry; the prefix cache puts itself here.
        self.evict: Callable[[int, int], None] = lambda group, count: None
        slots = limits.max_model_len + LOOKAHEAD_SLOTS
        table_shape = (limits.max_num_seqs, -(-slots // limits.block_size))
        self.tables = tuple(np.zeros(table_shape, dtype=np.int32) for _ in (FULL, SLIDING))
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))

    def _new_layer(self, config: ModelConfig, index: int, group: int, num_blocks: int) -> LayerCache:
        layer = config.layers[index]
        keys, values, k_scale, v_scale = new_kv_cache(
            num_blocks, self.block_size, layer.num_kv_heads, layer.head_dim, self.limits.dtype, self.device
        )
        return LayerCache(
            group=group,
            window=layer.window,
            scale=layer.head_dim**-0.5,
            first_slot=max(0, index - config.num_layers + 1),
            keys=keys,
            values=values,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence that fits when it is alone."""
        in_blocks = self.pools[FULL].num_blocks * self.block_size - LOOKAHEAD_SLOTS
        return (
            min(self.limits.max_model_len, in_blocks)
            if self.group_layers[FULL]
            else self.limits.max_model_len
        )

    @property
    def total_bytes(self) -> int:
        return sum(pool.num_blocks * self.block_bytes[group] for group, pool in enumerate(self.pools))

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks that somebody holds, the prefix cache included."""
        return sum(pool.num_used * self.block_bytes[group] for group, pool in enumerate(self.pools))

    @property
    def window_bytes(self) -> int:
        """Bytes of one window in all sliding layers: what a snapshot takes, and a sequence beside its tokens."""
        return -(-self.window // self.block_size) * self.block_bytes[SLIDING]

    def open(
        self, full: Sequence[int] = (), sliding: Sequence[int] = (), sliding_first: int = 0
    ) -> SequenceBlocks:
        """Start a sequence, on shared blocks of a cached prefix if there is one."""
        row = self._free_rows.pop()
        self.pools[FULL].hold(full)
        self.pools[SLIDING].hold(sliding)
        blocks = SequenceBlocks(row, list(full), list(sliding), sliding_first)
        self.tables[FULL][row, : len(full)] = full
        self.tables[SLIDING][row, sliding_first : sliding_first + len(sliding)] = sliding
        return blocks

    def grow(self, blocks: SequenceBlocks, group: int, num_slots: int) -> None:
        """Make slots up to num_slots - 1 exist in a group.

        Raises:
            OutOfBlocks: even after eviction; the sequence keeps what it had.
        """
        missing = self._missing(blocks, group, num_slots)
        if not missing:
            return
        held, first = _held(blocks, group)
        start, pool = first + len(held), self.pools[group]
        # What cannot succeed must not cost the prefix cache anything.
        if pool.num_free < missing <= pool.num_free + pool.num_cached:
            self.evict(group, missing)
        new = pool.allocate(missing)
        held.extend(new)
        self.tables[group][blocks.row, start : start + missing] = new

    def stretch(self, blocks: SequenceBlocks, num_slots: int, num_spare: int) -> None:
        """As `grow` in both groups, if nobody will miss the blocks: of the full ones `num_spare` stay free, and of
        the sliding ones a sequence holds no more than the plan has for it."""
        num_slots = min(num_slots, self.tables[FULL].shape[1] * self.block_size)
        full, sliding = (self._missing(blocks, group, num_slots) for group in (FULL, SLIDING))
        fits_full = not full or self.pools[FULL].num_free >= full + num_spare
        fits_sliding = not sliding or (
            len(blocks.sliding) + sliding <= self._most_sliding and self.pools[SLIDING].num_free >= sliding
        )
        if fits_full and fits_sliding:
            self.grow(blocks, FULL, num_slots)
            self.grow(blocks, SLIDING, num_slots)

    def _missing(self, blocks: SequenceBlocks, group: int, num_slots: int) -> int:
        """How many blocks of a group slots up to num_slots - 1 lack."""
        if group == SLIDING and not self.group_layers[SLIDING]:
            return 0
        held, first = _held(blocks, group)
        return max(0, -(-num_slots // self.block_size) - first - len(held))

    def num_slots(self, blocks: SequenceBlocks) -> int:
        """Slots that exist for a sequence."""
        full = len(blocks.full) if self.group_layers[FULL] else None
        sliding = blocks.sliding_first + len(blocks.sliding) if self.group_layers[SLIDING] else None
        return min(n for n in (full, sliding) if n is not None) * self.block_size

    def trim(self, blocks: SequenceBlocks, num_slots: int) -> None:
        """Free the sliding blocks that neither slot num_slots nor a snapshot at the last boundary can see."""
        boundary = num_slots - num_slots % self.block_size
        keep = max(0, boundary - self.window) // self.block_size
        count = min(keep - blocks.sliding_first, len(blocks.sliding))
        if count > 0:
            self.pools[SLIDING].release(blocks.sliding[:count])
            del blocks.sliding[:count]
            blocks.sliding_first += count

    @torch.inference_mode()  # an abort comes here between steps, and the cache may have been made in that mode
    def clear_modules(self, blocks: SequenceBlocks, begin: int, end: int) -> None:
        """Empty the blocks that begin in slots `begin` to `end` - 1 in the layers of the MTP modules, which have not
        written there: what somebody else left would be attended to."""
        first, last = (-(-slot // self.block_size) for slot in (begin, end))
        sliding = slice(max(0, first - blocks.sliding_first), max(0, last - blocks.sliding_first))
        ids = (blocks.full[first:last], blocks.sliding[sliding])
        for layer in self.layers.values():
            if layer.first_slot and ids[layer.group]:
                for tensor in (layer.keys, layer.values, layer.k_scale, layer.v_scale):
                    if tensor is not None:
                        tensor[ids[layer.group]] = 0

    def close(self, blocks: SequenceBlocks) -> None:
        """The sequence lets go of everything; blocks that the prefix cache holds stay."""
        self.pools[FULL].release(blocks.full)
        self.pools[SLIDING].release(blocks.sliding)
        blocks.full, blocks.sliding = [], []
        self._free_rows.append(blocks.row)

    def sliding_before(self, blocks: SequenceBlocks, boundary: int) -> tuple[int, list[int]] | None:
        """First index and ids of the sliding blocks that a continuation at `boundary` needs; None if gone."""
        if not self.group_layers[SLIDING]:
            return 0, []
        first = max(0, boundary - self.window) // self.block_size
        if first < blocks.sliding_first:
            return None
        ids = blocks.sliding[
            first - blocks.sliding_first : boundary // self.block_size - blocks.sliding_first
        ]
        return first, ids


def _held(blocks: SequenceBlocks, group: int) -> tuple[list[int], int]:
    """The blocks of a group that a sequence holds, and the number of the first."""
    return (blocks.full, 0) if group == FULL else (blocks.sliding, blocks.sliding_first)


def _windows(config: ModelConfig, num_modules: int) -> list[tuple[int, int]]:
    cached = config.layers[: config.num_layers + num_modules]
    return [(i, layer.window) for i, layer in enumerate(cached) if layer.window is not None]


def group_layers(config: ModelConfig, num_modules: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layer indices of the full and of the sliding group, the first `num_modules` MTP modules included."""
    sliding = tuple(i for i, _ in _windows(config, num_modules))
    full = tuple(i for i in range(config.num_layers + num_modules) if i not in sliding)
    return full, sliding


def block_bytes(config: ModelConfig, limits: CacheLimits) -> tuple[int, int]:
    """Bytes of one block of each group over all its layers, the scales of an int8 cache included."""

    def per_position(layer: LayerConfig) -> int:
        scales = 2 * 4 * layer.num_kv_heads if limits.dtype == torch.int8 else 0
        return kv_bytes_per_position(layer, limits.dtype.itemsize) + scales

    full, sliding = (
        limits.block_size * sum(per_position(config.layers[i]) for i in layers)
        for layers in group_layers(config, limits.num_modules)
    )
    return full, sliding


def sliding_blocks_per_sequence(config: ModelConfig, limits: CacheLimits) -> int:
    """Most sliding blocks that a sequence holds between two steps.

    From one window before the last block boundary that all modules have passed, to the furthest draft.
    """
    window = max((w for _, w in _windows(config, limits.num_modules)), default=0)
    if not window:
        return 0
    span = window + limits.block_size + limits.max_deferred_tokens + LOOKAHEAD_SLOTS
    return -(-(span + limits.block_size - 1) // limits.block_size)


def plan_blocks(
    config: ModelConfig, limits: CacheLimits, kv_cache_bytes: int | None = None
) -> tuple[int, int]:
    """How many blocks each group gets.

    Sliding blocks for `max_num_seqs` sequences and one step's prefill are guaranteed; of the rest a share is
    for cached windows and the remainder for full-attention layers. Without a budget the cache holds all
    sequences at full length, or as much of that as fits into 4 GiB, but always one sequence.

    Raises:
        ConfigError: the budget does not hold a single block beyond the guaranteed ones; gives the bytes.
    """
    per_full, per_sliding = block_bytes(config, limits)
    size = limits.block_size
    guaranteed = 0
    if per_sliding:
        prefill = -(-limits.max_batched_tokens // size) + limits.max_num_seqs
        guaranteed = limits.max_num_seqs * sliding_blocks_per_sequence(config, limits) + prefill
    one_sequence = -(-(limits.max_model_len + LOOKAHEAD_SLOTS) // size)
    most = limits.max_num_seqs * one_sequence
    fixed_bytes = guaranteed * per_sliding
    if kv_cache_bytes is None:
        room = max(DEFAULT_CAP_BYTES - fixed_bytes, one_sequence * per_full, 0)
        kv_cache_bytes = fixed_bytes + int(min(room, most * per_full) / (1 - SNAPSHOT_SHARE)) + per_full
    room = kv_cache_bytes - fixed_bytes
    if room < per_full + LOOKAHEAD_SLOTS // size * per_full:
        raise ConfigError(
            f"kv_cache_bytes = {kv_cache_bytes} is too small: {limits.max_num_seqs} sequences need "
            f"{fixed_bytes} bytes for sliding windows and at least {per_full} bytes for one block; "
            "raise it, or lower max_num_seqs or max_num_batched_tokens"
        )
    if not per_sliding:
        return (min(most * 2, room // per_full) if per_full else most), 0
    if not per_full:
        return most * 2, kv_cache_bytes // per_sliding
    snapshots = int(room * SNAPSHOT_SHARE) // per_sliding
    return (room - snapshots * per_sliding) // per_full, guaranteed + snapshots


__all__ = ["FULL", "SLIDING", "CacheLimits", "KVCache", "OutOfBlocks", "SequenceBlocks"]
