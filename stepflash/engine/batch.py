"""What one run of the network works on: the tokens of several sequences laid end to end.

A `Span` is some consecutive tokens of one sequence. `build_batch` turns spans into flat ids, positions, cache
slots and tables; nothing is padded. The same batch serves the trunk (`shift` 0) and MTP module k (`shift` k),
which embeds the token in slot s at position s - k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stepflash.engine.kv_cache import KVCache, SequenceBlocks


@dataclass(frozen=True, slots=True)
class Span:
    """`token_ids` belong into slots start, start + 1, ... of one sequence."""

    blocks: SequenceBlocks
    start: int
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Flat tensors over num_tokens tokens, and the tables of their sequences.

    input_ids, positions: [num_tokens] int64. slot_mapping[group]: [num_tokens] int64, flat cache slots.
    block_tables[group]: [num_seqs, max_blocks] int32. cu_seqlens: [num_seqs + 1] int32 token boundaries, which
    `bounds` has as a list; context_lens: [num_seqs] int32, slots per sequence that exist after this run.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: tuple[Tensor, Tensor]
    block_tables: tuple[Tensor, Tensor]
    cu_seqlens: Tensor
    context_lens: Tensor
    bounds: list[int]

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]


def build_batch(cache: KVCache, spans: Sequence[Span], shift: int = 0) -> TokenBatch:
    """Lay spans end to end. Every span has at least one token, and its slots exist."""
    lengths = [len(span.token_ids) for span in spans]
    assert all(lengths), "an empty span in a batch"
    rows = np.array([span.blocks.row for span in spans])
    starts = np.array([span.start for span in spans])
    counts = np.array(lengths)
    cu_seqlens = np.zeros(len(spans) + 1, dtype=np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    slots = np.arange(cu_seqlens[-1]) + np.repeat(starts - cu_seqlens[:-1], counts)
    token_rows = np.repeat(rows, counts)
    index, offset = np.divmod(slots, cache.block_size)
    context_lens = (starts + counts).astype(np.int32)
    num_blocks = -(-int(context_lens.max()) // cache.block_size)
    flat = [token_id for span in spans for token_id in span.token_ids]

    def to_device(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if cache.device.type == "cpu" else tensor.to(cache.device)

    full, sliding = (table[token_rows, index] * np.int64(cache.block_size) + offset for table in cache.tables)
    full_table, sliding_table = (table[rows, :num_blocks] for table in cache.tables)
    return TokenBatch(
        input_ids=to_device(np.array(flat, dtype=np.int64)),
        positions=to_device(slots - shift),
        slot_mapping=(to_device(full), to_device(sliding)),
        block_tables=(to_device(full_table), to_device(sliding_table)),
        cu_seqlens=to_device(cu_seqlens),
        context_lens=to_device(context_lens),
        bounds=cu_seqlens.tolist(),
    )
