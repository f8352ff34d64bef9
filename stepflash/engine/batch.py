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
        row, end = span.blocks.row, span.start + len(span.token_ids)
        slots = np.arange(span.start, end)
        index, offset = slots // size, slots % size
        mappings = [table[row, index] * np.int64(size) + offset for table in cache.tables]
        tables = [table[row : row + 1, : -(-end // size)] for table in cache.tables]
        token_ids: Sequence[int] = span.token_ids
        bounds = np.array([0, len(token_ids)], dtype=np.int32)
        context_lens = np.array([end], dtype=np.int32)
    else:
        rows = np.array([span.blocks.row for span in spans])
        starts = np.array([span.start for span in spans])
        counts = np.array([len(span.token_ids) for span in spans])
        bounds = np.zeros(len(spans) + 1, dtype=np.int32)
        np.cumsum(counts, out=bounds[1:])
        slots = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], counts)
        token_rows = np.repeat(rows, counts)
        index, offset = slots // size, slots % size
        mappings = [table[token_rows, index] * np.int64(size) + offset for table in cache.tables]
        context_lens = (starts + counts).astype(np.int32)
        num_blocks = -(-int(context_lens.max()) // size)
        tables = [table[rows, :num_blocks] for table in cache.tables]
        token_ids = [token_id for span in spans for token_id in span.token_ids]

    def to_device(array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if cache.device.type == "cpu" else tensor.to(cache.device)

    return TokenBatch(
        input_ids=to_device(np.array(token_ids, dtype=np.int64)),
        positions=to_device(slots - shift if shift else slots),
        slot_mapping=(to_device(mappings[0]), to_device(mappings[1])),
        block_tables=(to_device(tables[0]), to_device(tables[1])),
        cu_seqlens=to_device(bounds),
        context_lens=to_device(context_lens),
        bounds=bounds.tolist(),
    )
