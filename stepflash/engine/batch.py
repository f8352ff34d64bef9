"""What one run of the network works on: the tokens of several sequences laid end to end.

A `Span` is some consecutive tokens of one sequence. `build_batch` turns spans into flat ids, positions, cache
slots and tables; nothing is padded. The same batch serves the trunk (`shift` 0) and MTP module k (`shift` k),
which embeds the token in slot s at position s - k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepflash.engine.kv_cache import KVCache, SequenceBlocks

Array = npt.NDArray[np.int64] | npt.NDArray[np.int32]


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
    size = cache.block_size
    if len(spans) == 1:
        # Single-stream decoding runs this up to four times per step: nothing but slices.
        (span,) = spans
        num_tokens = len(span.token_ids)
        row, end = span.blocks.row, span.start + num_tokens
        token_rows: int | Array = row
        slots = np.arange(span.start, end)
        flat: Sequence[int] = span.token_ids
        bounds = np.array([0, num_tokens], dtype=np.int32)
        context_lens = np.array([end], dtype=np.int32)
        tables = [table[row : row + 1, : -(-end // size)] for table in cache.tables]
    else:
        rows = np.array([span.blocks.row for span in spans])
        starts = np.array([span.start for span in spans])
        counts = np.array([len(span.token_ids) for span in spans])
        bounds = np.zeros(len(spans) + 1, dtype=np.int32)
        np.cumsum(counts, out=bounds[1:])
        token_rows = np.repeat(rows, counts)
        slots = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], counts)
        flat = [token_id for span in spans for token_id in span.token_ids]
        context_lens = (starts + counts).astype(np.int32)
        tables = [table[rows, : -(-int(context_lens.max()) // size)] for table in cache.tables]
    index, offset = slots // size, slots % size
    # One transfer for everything per token.
    packed = np.empty((4, len(flat)), dtype=np.int64)
    packed[0] = flat
    packed[1] = slots - shift
    for group, table in enumerate(cache.tables):
        packed[2 + group] = table[token_rows, index] * np.int64(size) + offset

    def to_device(array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if cache.device.type == "cpu" else tensor.to(cache.device)

    input_ids, positions, full_slots, sliding_slots = to_device(packed).unbind(0)
    return TokenBatch(
        input_ids=input_ids,
        positions=positions,
        slot_mapping=(full_slots, sliding_slots),
        block_tables=(to_device(tables[0]), to_device(tables[1])),
        cu_seqlens=to_device(bounds),
        context_lens=to_device(context_lens),
        bounds=bounds.tolist(),
    )
