"""What one run of the network works on: the tokens of several sequences laid end to end.

A `Span` is some consecutive tokens of one sequence. `build_batch` turns spans into flat ids, positions, cache
slots and tables; nothing is padded. The same batch serves the trunk (`shift` 0) and MTP module k (`shift` k),
which embeds the token in slot s at position s - k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from stepflash.engine.kv_cache import KVCache, SequenceBlocks

FEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Span:
    """`token_ids` belong into slots start, start + 1, ... of one sequence."""

    blocks: SequenceBlocks
    start: int
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Flat tensors over num_tokens tokens, and the tables of their sequences.

    per_token: [4, num_tokens] int64: ids, positions, and flat cache slots of the full and of the sliding group.
    cu_seqlens: [num_seqs + 1] int32 token boundaries. context_lens: [num_seqs] int32 slots that exist after this
    run. block_tables[group]: [num_seqs, max_blocks] int32.
    """

    per_token: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor
    block_tables: tuple[Tensor, Tensor]

    @property
    def input_ids(self) -> Tensor:
        """[num_tokens] int64"""
        return self.per_token[0]

    @property
    def positions(self) -> Tensor:
        """[num_tokens] int64"""
        return self.per_token[1]

    def slot_mapping(self, group: int) -> Tensor:
        """Flat cache slots [num_tokens] int64 in the full or the sliding group."""
        return self.per_token[2 + group]


def build_batch(cache: KVCache, spans: Sequence[Span], shift: int = 0) -> TokenBatch:
    """Lay spans end to end. Every span has at least one token, and its slots exist."""
    lengths = [len(span.token_ids) for span in spans]
    bounds = [0, *accumulate(lengths)]
    context_lens = [span.start + length for span, length in zip(spans, lengths, strict=True)]
    if bounds[-1] <= FEW_TOKENS:
        per_token = torch.tensor(token_rows(cache.block_size, spans, shift), dtype=torch.long)
    else:
        per_token = torch.from_numpy(_per_token_vectorised(cache, spans, lengths, shift))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    seq_lens = torch.tensor(context_lens, dtype=torch.int32)
    num_blocks = -(-max(context_lens) // cache.block_size)
    if len(spans) == 1:
        row = spans[0].blocks.row
        tables = [table[row : row + 1, :num_blocks] for table in cache.tables]
    else:
        rows = [span.blocks.row for span in spans]
        tables = [table[rows, :num_blocks] for table in cache.tables]
    block_tables = [torch.from_numpy(table) for table in tables]
    if cache.device.type != "cpu":
        # Rows of an even number of tokens begin at multiples of 16 bytes, as Triton's kernels like it.
        per_token = pad(per_token, (0, bounds[-1] % 2)).to(cache.device)[:, : bounds[-1]]
        cu_seqlens, seq_lens = cu_seqlens.to(cache.device), seq_lens.to(cache.device)
        block_tables = [table.to(cache.device) for table in block_tables]
    return TokenBatch(per_token, cu_seqlens, seq_lens, (block_tables[0], block_tables[1]))


def token_rows(block_size: int, spans: Sequence[Span], shift: int) -> list[list[int]]:
    """Ids, positions and slots of both groups. For few tokens plain Python beats a dozen array calls."""
    input_ids: list[int] = []
    positions: list[int] = []
    full: list[int] = []
    sliding: list[int] = []
    for span in spans:
        blocks, first = span.blocks, span.blocks.sliding_first
        input_ids += span.token_ids
        for slot in range(span.start, span.start + len(span.token_ids)):
            index, offset = divmod(slot, block_size)
            positions.append(slot - shift)
            full.append(blocks.full[index] * block_size + offset)
            sliding.append(blocks.sliding[index - first] * block_size + offset if blocks.sliding else 0)
    return [input_ids, positions, full, sliding]


def _per_token_vectorised(
    cache: KVCache, spans: Sequence[Span], lengths: list[int], shift: int
) -> npt.NDArray[np.int64]:
    """The same as one array [4, num_tokens], for prompts."""
    packed = np.empty((4, sum(lengths)), dtype=np.int64)
    packed[0] = [token_id for span in spans for token_id in span.token_ids]
    slots = np.concatenate([np.arange(s.start, s.start + n) for s, n in zip(spans, lengths, strict=True)])
    packed[1] = slots - shift
    rows = np.repeat([span.blocks.row for span in spans], lengths)
    for group, table in enumerate(cache.tables):
        blocks = table[rows, slots // cache.block_size].astype(np.int64)
        packed[2 + group] = blocks * cache.block_size + slots % cache.block_size
    return packed
