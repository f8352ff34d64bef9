"""The trunk over verifying sequences and their next drafts as one captured pass; see `cuda_graphs`.

Which drafts are right is known on the device before the host knows it. What follows is laid out so that nothing but
numbers depends on it: module k runs over as many slots of a sequence as it would have to read were all drafts right,
and the tokens beyond those that it really has write nothing and are read by nobody.

In slots: a sequence has its last known token in slot `start` and drafts behind it. The trunk chooses a token after
each; n of the drafts are right, so the tokens of slots start + 1 .. start + 1 + n are known now. Module k, which has
read all slots before, reads these and the k - 1 drafts of the modules before it; its own is what it says at the last
one. In slot start + 1 + i it reads what the module before left in slot start + i: the trunk in this pass, or a module
in this pass but for i = 0, whose row is of an earlier pass (`pending`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepflash.engine.batch import Span, TokenBatch
from stepflash.engine.cuda_forward import Forward
from stepflash.engine.cuda_replay import MOST, Graphs, Staged, Tables, round_up, size_for
from stepflash.engine.kv_cache import MAX_MODULES, KVCache
from stepflash.engine.network import Ahead, Drafts, Pass
from stepflash.kernels import ops
from stepflash.model.transformer import Step3p5ForCausalLM

# Rows of the words per token. Of the trunk and of modules: a token's id, or where among the choices it stands if it
# is known; position and slots; the draft behind it (-1: none), or where among the states its input is; its sequence;
# its place there; and how many tokens beyond the right drafts the module reads.
ID, POSITION, SLOTS, NEXT, SEQUENCE, PLACE, BEYOND = 0, 1, slice(2, 4), 4, 5, 6, 7
NUM_ROWS = 8
NOWHERE = -(1 << 20)

Ints = npt.NDArray[np.int64]
Sizes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where everything lies for sequences with so many tokens; what does not change from step to step.

    `sizes` and `counts`: tokens of the trunk and of each module, filled up and as they are. `begins[k]`: first token
    of each sequence in pass k. `words` and `lengths`: what the host sends, the changing parts blank; a column's slot
    is `ahead` from the start of sequence `owner`, its position `shift` less than its slot, and `is_relative` tells
    which lengths count from there, too.
    """

    sizes: Sizes
    counts: Sizes
    begins: list[list[int]]
    words: Ints
    last: Ints
    lengths: npt.NDArray[np.int32]
    owner: Ints
    ahead: Ints
    shift: Ints
    length_owner: Ints
    is_relative: npt.NDArray[np.int32]


def _columns(sizes: Sizes) -> list[int]:
    """First column of each pass, and the number of columns; all begin at multiples of 64 bytes."""
    return [0, *accumulate(round_up(size, 8) for size in sizes)]


def _num_lengths(sizes: Sizes) -> list[int]:
    """Where boundaries and context lengths of each pass begin, in turn, and how many words they take."""
    return [0, *accumulate(round_up(count, 8) for size in sizes for count in (size + 1, size))]


def _places(sizes: Sizes) -> tuple[int, list[int], list[int]]:
    """Where among the states the trunk's rows begin, and what each module reads and leaves; before them is what is
    pending. Entry k of the lists is module k's."""
    trunk = max(0, len(sizes) - 2) * sizes[0]
    begins = list(accumulate((2 * size for size in sizes[1:]), initial=trunk + sizes[0]))
    return trunk, [0, *begins], [0, *(begin + size for begin, size in zip(begins, sizes[1:], strict=False))]


@lru_cache(maxsize=256)
def _layout(spans: Sizes, depth: int) -> _Layout | None:
    """For sequences with so many tokens; None if there are too many."""
    num_seqs = len(spans)
    counts = tuple(sum(spans) + num_seqs * max(0, k - 1) for k in range(depth + 1))
    if counts[-1] > MOST:
        return None
    sizes = tuple(map(size_for, counts))
    columns, places = _columns(sizes), _num_lengths(sizes)
    trunk_at, _, left_at = _places(sizes)
    words = np.zeros((NUM_ROWS, columns[-1]), dtype=np.int64)
    last = np.zeros((MAX_MODULES, round_up(sizes[0], 8)), dtype=np.int64)
    lengths = np.zeros(places[-1], dtype=np.int32)
    owner, ahead, shift = (np.zeros(columns[-1], dtype=np.int64) for _ in range(3))
    length_owner, is_relative = np.zeros(places[-1], dtype=np.int64), np.zeros(places[-1], dtype=np.int32)
    begins: list[list[int]] = []
    for k, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        first = 1 if k else 0  # slots after `start`
        in_pass = np.array(spans) + max(0, k - 1)
        begins.append([0, *accumulate(in_pass.tolist())][:-1])
        sequence = np.repeat(np.arange(num_seqs), in_pass)
        place = np.arange(count) - np.array(begins[k])[sequence]
        whole = slice(columns[k], columns[k] + size)
        live, more = slice(columns[k], columns[k] + count), slice(columns[k] + count, columns[k] + size)
        owner[live], ahead[whole], shift[whole] = sequence, first, k
        ahead[live] += place
        words[SEQUENCE, live], words[PLACE, live] = sequence, place
        if k:
            words[ID, live] = np.array(begins[0])[sequence] + np.minimum(place, np.array(spans)[sequence] - 1)
            words[BEYOND, live], words[BEYOND, more] = k, NOWHERE
            last[k - 1, :num_seqs] = np.array(begins[k]) + k - 1
        else:
            words[SEQUENCE, more] = num_seqs + np.arange(size - count)
        if k == 1:
            words[NEXT, whole] = trunk_at + words[ID, whole]
        elif k:
            before = left_at[k - 1] + np.array(begins[k - 1])[sequence] + place - 1
            words[NEXT, more] = (k - 2) * num_seqs
            words[NEXT, live] = np.where(place == 0, (k - 2) * num_seqs + sequence, before)
        # Sequences, then the tokens that fill up, then sequences without tokens.
        bounds, contexts = lengths[places[2 * k] :], lengths[places[2 * k + 1] :]
        used = num_seqs + size - count
        bounds[: size + 1] = size
        bounds[: used + 1] = [0, *accumulate((*in_pass.tolist(), *[1] * (size - count)))]
        contexts[:used] = [*(first + in_pass), *[first + 1] * (size - count)]
        length_owner[places[2 * k + 1] :][:num_seqs] = np.arange(num_seqs)
        is_relative[places[2 * k + 1] :][:used] = 1
    return _Layout(
        sizes, counts, begins, words, last, lengths, owner, ahead, shift, length_owner, is_relative
    )


def _views(words: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, int]:
    """Words per token, each module's last tokens, lengths; how many int32 words they are."""
    num_columns, stride, num_lengths = _columns(sizes)[-1], round_up(sizes[0], 8), _num_lengths(sizes)[-1]
    ends = list(accumulate((2 * NUM_ROWS * num_columns, 2 * MAX_MODULES * stride, num_lengths)))
    per_token = words[: ends[0]].view(torch.int64).view(NUM_ROWS, num_columns)
    last = words[ends[0] : ends[1]].view(torch.int64).view(MAX_MODULES, stride)
    return per_token, last, words[ends[1] : ends[2]], ends[2]


class AheadPasses:
    """Buffers of these passes, and the passes over them."""

    def __init__(
        self,
        model: Step3p5ForCausalLM,
        cache: KVCache,
        vocab_limit: int,
        forward: Forward,
        graphs: Graphs,
        tables: Tables,
    ) -> None:
        self._model, self._cache, self._vocab_limit = model, cache, vocab_limit
        self._forward, self._graphs, self._tables = forward, graphs, tables
        device, embedding = cache.device, model.model.embed_tokens.weight
        num_passes = 1 + MAX_MODULES
        self._staged = Staged(
            2 * NUM_ROWS * MOST * num_passes + 2 * MAX_MODULES * MOST + 3 * MOST * num_passes, device
        )
        self._sent: _Layout | None = None
        self._states = torch.zeros(
            (3 * MAX_MODULES * MOST, embedding.shape[1]), dtype=embedding.dtype, device=device
        )
        # By pass: the tokens chosen; and for the host with the bits of their logits.
        self._choices = torch.zeros((num_passes, MOST), dtype=torch.int64, device=device)
        self._best = torch.zeros((2, num_passes, MOST), dtype=torch.int32, device=device)

    def run(self, spans: Sequence[Span], pending: Sequence[Tensor | None], depth: int) -> Ahead | None:
        """The trunk over spans of a token and its drafts, and `depth` drafts after the ones that are right.

        Every module has read all known tokens; `pending` holds, by module from the second, then by sequence, the row
        that it reads next. None where there is no graph for this. The pass has no logits, only every token's best.
        """
        layout = None if self._graphs.is_off else _layout(tuple(len(span.token_ids) for span in spans), depth)
        rows = [row for row in pending if row is not None and row.shape[0] == 1]
        if layout is None or len(rows) < len(pending):
            return None
        if rows:
            torch.cat(rows, out=self._states[: len(rows)])
        width = self._send(spans, layout)
        if not self._graphs.run(("ahead", layout.sizes, width), partial(self._compute, layout.sizes, width)):
            return None
        trunk_at, read_at, left_at = _places(layout.sizes)
        # The engine keeps rows of them for later passes.
        kept = self._states[trunk_at : left_at[-1] + layout.sizes[-1]].clone()
        best = self._best.cpu()
        values = best[1].view(torch.float32)
        count, num_seqs = layout.counts[0], len(spans)
        hidden_states = kept[:count]
        trunk = Pass(
            hidden_states,
            hidden_states.new_empty((0, 0), dtype=torch.float32),
            (best[0, 0, :count].tolist(), values[0, :count].tolist()),
        )
        drafts = Drafts(
            [kept[at - trunk_at :][:n] for at, n in zip(read_at[1:], layout.counts[1:], strict=False)],
            [kept[at - trunk_at :][:n] for at, n in zip(left_at[1:], layout.counts[1:], strict=False)],
            best[0, 1 : depth + 1, :num_seqs].flatten().tolist(),
            values[1 : depth + 1, :num_seqs].flatten().tolist(),
            layout.begins[1:],
        )
        return Ahead((), [span.token_ids[1:] for span in spans], trunk, drafts)

    def _compute(self, sizes: Sizes, width: int) -> None:
        """The passes, from buffers to buffers. They depend on nothing else, and wait for nothing."""
        model, states, size, depth = self._model, self._states, sizes[0], len(sizes) - 1
        words, last, lengths, _ = _views(self._staged.device, sizes)
        columns, places = _columns(sizes), _num_lengths(sizes)
        trunk_at, read_at, left_at = _places(sizes)

        def batch_of(k: int) -> TokenBatch:
            per_token = words[:4, columns[k] : columns[k] + sizes[k]]
            bounds, contexts = lengths[places[2 * k] :], lengths[places[2 * k + 1] :]
            tables = self._tables.views(sizes[k], width)
            return TokenBatch(per_token, bounds[: sizes[k] + 1], contexts[: sizes[k]], tables)

        batch = batch_of(0)
        hidden_states = self._forward.trunk(batch)
        states[trunk_at : trunk_at + size] = hidden_states
        self._choose(0, model.compute_logits(hidden_states))

        # How many drafts of each sequence are right: the place of the first choice that is not the draft behind it.
        is_right = self._choices[0, :size] == words[NEXT, :size]
        wrong = words[PLACE, :size].masked_fill(is_right, MOST)
        num_right = torch.zeros_like(wrong)
        num_right.scatter_reduce_(0, words[SEQUENCE, :size], wrong, "amin", include_self=False)
        modules = words[:, columns[1] :]
        beyond = modules[PLACE] - num_right[modules[SEQUENCE]]  # 1 and up: drafts of this pass
        modules[SLOTS].masked_fill_(beyond >= modules[BEYOND], -1)
        drafted = beyond.clamp(1, depth) * MOST + modules[SEQUENCE]
        source = torch.where(beyond > 0, drafted, modules[ID])
        last = last[:, :size] + num_right

        for k in range(1, depth + 1):
            batch, begin = batch_of(k), columns[k] - columns[1]
            ids = self._choices.view(-1)[source[begin : begin + sizes[k]]]
            previous = states[words[NEXT, columns[k] : columns[k] + sizes[k]]]
            states[read_at[k] : read_at[k] + sizes[k]] = previous
            hidden_states = self._forward.module(k, ids, previous, batch)
            states[left_at[k] : left_at[k] + sizes[k]] = hidden_states
            self._choose(k, model.mtp_compute_logits(k, hidden_states[last[k - 1]]))
        self._best[0, : depth + 1, :size] = self._choices[: depth + 1, :size]

    def _choose(self, k: int, logits: Tensor) -> None:
        ids, values = ops.best_tokens(logits, self._vocab_limit)
        self._choices[k, : logits.shape[0]] = ids
        self._best[1, k, : logits.shape[0]].view(torch.float32).copy_(values)

    def _send(self, spans: Sequence[Span], layout: _Layout) -> int:
        """Fill the buffers for these spans; returns the tables' width."""
        self._staged.wait()
        per_token, last, lengths, num_words = _views(self._staged.host, layout.sizes)
        words, cache, count = per_token.numpy(), self._cache, layout.counts[0]
        if self._sent is not layout:
            words[:], last.numpy()[:], self._sent = layout.words, layout.last, layout
        ids = [token_id for span in spans for token_id in span.token_ids]
        words[ID, : layout.sizes[0]] = ids[0]
        words[ID, :count] = ids
        words[NEXT, : layout.sizes[0]] = -1
        words[NEXT, : count - 1] = ids[1:]
        words[NEXT, [begin - 1 for begin in layout.begins[0][1:]]] = -1
        starts = np.array([span.start for span in spans])
        rows = np.array([span.blocks.row for span in spans])[layout.owner]
        slots = starts[layout.owner] + layout.ahead
        words[POSITION] = slots - layout.shift
        block, offset = np.divmod(slots, cache.block_size)
        for row, table in zip(words[SLOTS], cache.tables, strict=True):
            row[:] = table[rows, block]
            row *= cache.block_size
            row += offset
        words[SLOTS, count : layout.sizes[0]] = -1
        contexts = layout.lengths + layout.is_relative * starts[layout.length_owner]
        lengths.numpy()[:] = contexts
        self._staged.send(num_words)
        missing = max(size - count for size, count in zip(layout.sizes, layout.counts, strict=True))
        return self._tables.send([span.blocks for span in spans], len(spans) + missing, int(contexts.max()))
