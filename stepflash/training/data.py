"""Documents to packs: every batch is one flat run of tokens with document boundaries. No padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A document: token ids, and for each token whether predicting it counts in the loss.
Document = tuple[Sequence[int], Sequence[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Several documents end to end.

    input_ids, positions: [num_tokens] int64, positions counted from each document's start.
    loss_mask: [num_tokens] bool; True where this token is a target.
    cu_seqlens: boundaries, from 0 to num_tokens.
    """

    input_ids: Tensor
    positions: Tensor
    loss_mask: Tensor
    cu_seqlens: tuple[int, ...]

    def targets(self, offset: int) -> tuple[Tensor, Tensor]:
        """Rows whose token `offset` places later lies in the same document and counts, and those tokens.

        Returns:
            rows [num_targets] int64 into the pack, target ids [num_targets].
        """
        rows = torch.arange(max(self.input_ids.shape[0] - offset, 0))
        same = self.positions[offset:] == self.positions[: len(rows)] + offset
        rows = rows[same & self.loss_mask[offset:]]
        return rows, self.input_ids[rows + offset]


def pack(documents: Sequence[Document]) -> PackedBatch:
    """Lay documents end to end."""
    lengths = [len(ids) for ids, _ in documents]
    cu_seqlens = [0]
    for length in lengths:
        cu_seqlens.append(cu_seqlens[-1] + length)
    return PackedBatch(
        input_ids=torch.tensor([i for ids, _ in documents for i in ids], dtype=torch.int64),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=torch.tensor([bool(m) for _, mask in documents for m in mask]),
        cu_seqlens=tuple(cu_seqlens),
    )


def packs(documents: Iterable[Document], num_tokens: int, max_length: int) -> Iterator[PackedBatch]:
    """Group a stream of documents into packs of at most `num_tokens`; longer ones than `max_length` are cut."""
    waiting: list[Document] = []
    total = 0
    for ids, mask in documents:
        ids, mask = ids[:max_length], mask[:max_length]
        if waiting and total + len(ids) > num_tokens:
            yield pack(waiting)
            waiting, total = [], 0
        waiting.append((ids, mask))
        total += len(ids)
    if waiting:
        yield pack(waiting)
