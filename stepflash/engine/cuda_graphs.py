"""Small passes of a packed model on a CUDA device, captured once and replayed as CUDA graphs.

With few tokens the kernels of a pass take less time than their launches from Python. A captured pass does again
exactly what it did: the same kernels, sizes and addresses. So everything that changes from pass to pass is read from
buffers that never move, and there is a graph for each of a few sizes: the module, the number of tokens (`SIZES`)
and how many blocks of a sequence the tables have room for (powers of two).

Tokens that are missing are filled up by repeating the first one, each as a sequence of its own that writes nothing
(slot -1): they meet the same experts, so they read no other weights. Sequences that are missing have no tokens.
Passes too large, or without logits, and models that cannot be captured go through `ModelNetwork`.
"""

from __future__ import annotations

import logging
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from stepflash.engine.attend import PagedAttention
from stepflash.engine.batch import Span, TokenBatch, token_rows
from stepflash.engine.kv_cache import KVCache, SequenceBlocks
from stepflash.engine.network import ModelNetwork, Pass
from stepflash.model.transformer import Step3p5ForCausalLM

logger = logging.getLogger(__name__)

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
MOST = SIZES[-1]
# Narrower tables would save nothing.
LEAST_WIDTH = 64

# Takes a function of no arguments, and whether it is the first of its kind; returns one that does again what that
# did to its tensors.
Capture = Callable[[Callable[[], None], bool], Callable[[], None]]


class _Staged:
    """int32 words that the host writes, and their copy on the device."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        # NOTE: the host may write again as soon as the last pass is over; every pass here ends with reading tokens.
        self.host = torch.zeros(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.device = torch.zeros(num_words, dtype=torch.int32, device=device)

    def send(self, num_words: int) -> None:
        self.device[:num_words].copy_(self.host[:num_words], non_blocking=True)


class _Tokens:
    """What a pass of `size` tokens reads but for its tables, as views of the host's and of the device's words.

    per_token [5, size] int64: ids, positions, slots of both groups, and of which tokens logits are wanted.
    """

    def __init__(self, staged: _Staged, size: int) -> None:
        stride = _round_up(size, 8)
        begins = [0, *accumulate((10 * stride, _round_up(size + 1, 8), _round_up(size, 8)))]
        self.num_words = begins[-1]

        def views(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            per_token = words[: begins[1]].view(torch.int64).view(5, stride)[:, :size]
            return per_token, words[begins[1] :][: size + 1], words[begins[2] :][:size]

        self.per_token, self.cu_seqlens, self.context_lens = views(staged.device)
        self.host = [view.numpy() for view in views(staged.host)]


class GraphNetwork:
    """A `Network`. What a pass returns as logits is valid until the next pass."""

    def __init__(
        self, model: Step3p5ForCausalLM, cache: KVCache, vocab_limit: int, capture: Capture | None = None
    ) -> None:
        self._model, self._cache, self._vocab_limit = model, cache, vocab_limit
        self._eager = ModelNetwork(model, cache)
        self._capture = cuda_capture(cache.device) if capture is None else capture
        self._replays: dict[tuple[int, int, int], Callable[[], None]] = {}
        self._is_off = False
        device, dtype = cache.device, model.model.embed_tokens.weight.dtype
        self._num_columns = cache.tables[0].shape[1]
        staged = _Staged(_Tokens(_Staged(10_000, torch.device("cpu")), MOST).num_words, device)
        self._staged_tokens, self._tokens = staged, {size: _Tokens(staged, size) for size in SIZES}
        self._staged_tables = _Staged(MOST * 2 * self._num_columns, device)
        # What the tables hold: their width, for which sequences with how many blocks, and the number of rows.
        self._tables: tuple[int, list[tuple[SequenceBlocks, int, int]], int] = 0, [], 0
        hidden_size, vocab_size = model.config.hidden_size, model.config.vocab_size
        self._previous = torch.zeros((MOST, hidden_size), dtype=dtype, device=device)
        self._hidden_states = torch.zeros((MOST, hidden_size), dtype=dtype, device=device)
        self._logits = torch.zeros((MOST, vocab_size), dtype=torch.float32, device=device)
        # Best tokens, and the bits of their logits: one transfer to the host.
        self._best = torch.zeros((2, MOST), dtype=torch.int32, device=device)

    @property
    def num_graphs(self) -> int:
        return len(self._replays)

    def trunk(self, spans: Sequence[Span], rows: Sequence[int]) -> Pass:
        return self._run(0, spans, None, rows) or self._eager.trunk(spans, rows)

    def module(self, module: int, spans: Sequence[Span], previous: Tensor, rows: Sequence[int]) -> Pass:
        return self._run(module, spans, previous, rows) or self._eager.module(module, spans, previous, rows)

    def _run(
        self, module: int, spans: Sequence[Span], previous: Tensor | None, rows: Sequence[int]
    ) -> Pass | None:
        """None where this pass has no graph."""
        num_tokens = sum(len(span.token_ids) for span in spans)
        if self._is_off or not rows or num_tokens > MOST:
            return None
        size = SIZES[bisect_left(SIZES, num_tokens)]
        width = self._send(module, spans, rows, size)
        if previous is not None:
            self._previous[:num_tokens] = previous
            if num_tokens < size:
                self._previous[num_tokens:size] = previous[0]
        replay = self._replay(module, size, width)
        if replay is None:
            return None
        replay()
        # The engine keeps rows of it for later passes.
        hidden_states = self._hidden_states[:num_tokens].clone()
        return Pass(hidden_states, self._logits[: len(rows)], self._read(len(rows)))

    def _read(self, num_rows: int) -> tuple[list[int], list[float]]:
        """Best tokens and their logits. Nothing else in a greedy decode step waits for the device."""
        best = self._best.cpu()[:, :num_rows]
        return best[0].tolist(), best[1].view(torch.float32).tolist()

    def _replay(self, module: int, size: int, width: int) -> Callable[[], None] | None:
        """What runs this pass over the buffers; captured at its first use."""
        key = module, size, width
        if key not in self._replays:
            is_first = all(other != module for other, _, _ in self._replays)
            try:
                self._replays[key] = self._capture(partial(self._compute, *key), is_first)
            except Exception:
                self._is_off = True
                logger.warning(
                    "CUDA graphs are off, decoding will be slower: a pass of %d tokens could not be captured",
                    size,
                    exc_info=True,
                )
                return None
        return self._replays[key]

    def _compute(self, module: int, size: int, width: int) -> None:
        """The pass, from buffers to buffers. It depends on nothing else, and waits for nothing."""
        tokens, model = self._tokens[size], self._model
        tables = self._staged_tables.device[: MOST * 2 * width].view(MOST, 2, width)[:size]
        batch = TokenBatch(
            tokens.per_token[:4], tokens.cu_seqlens, tokens.context_lens, (tables[:, 0], tables[:, 1])
        )
        ids, positions, attend = batch.input_ids, batch.positions, PagedAttention(self._cache, batch)
        if module:
            hidden_states = model.mtp_forward(module, ids, self._previous[:size], positions, attend)
            logits = model.mtp_compute_logits(module, hidden_states[tokens.per_token[4]])
        else:
            hidden_states = model(ids, positions, attend)
            logits = model.compute_logits(hidden_states[tokens.per_token[4]])
        # The same operation as the sampler's: the lowest id of equals, and NaN wins.
        best = logits[:, : self._vocab_limit].max(dim=-1)
        self._hidden_states[:size] = hidden_states
        self._logits[:size] = logits
        self._best[0, :size] = best.indices
        self._best[1, :size].view(torch.float32).copy_(best.values)

    def _send(self, module: int, spans: Sequence[Span], rows: Sequence[int], size: int) -> int:
        """Fill the buffers for these spans and some more tokens like the first; returns the tables' width."""
        lengths = [len(span.token_ids) for span in spans]
        contexts = [span.start + length for span, length in zip(spans, lengths, strict=True)]
        bounds = [0, *accumulate(lengths)]
        missing = size - bounds[-1]
        per_token = token_rows(self._cache.block_size, spans, module)
        for values, more in zip(per_token, (per_token[0][0], per_token[1][0], -1, -1), strict=True):
            values += [more] * missing
        no_seqs = size - len(spans) - missing
        bounds += [*range(bounds[-1] + 1, size + 1), *[size] * no_seqs]
        num_blocks = -(-max(contexts) // self._cache.block_size)
        contexts += [spans[0].start + 1] * missing + [0] * no_seqs
        tokens = self._tokens[size]
        tokens.host[0][:] = [*per_token, [*rows, *[0] * (size - len(rows))]]
        tokens.host[1][:], tokens.host[2][:] = bounds, contexts
        self._staged_tokens.send(tokens.num_words)
        return self._send_tables([span.blocks for span in spans], len(spans) + missing, num_blocks)

    def _send_tables(self, sequences: list[SequenceBlocks], num_rows: int, num_blocks: int) -> int:
        """The tables of these sequences, then the first one's again up to `num_rows`, if they changed."""
        width = min(max(LEAST_WIDTH, 1 << (num_blocks - 1).bit_length()), self._num_columns)
        held = [
            (blocks, len(blocks.full), blocks.sliding_first + len(blocks.sliding)) for blocks in sequences
        ]
        if self._tables[:2] != (width, held) or self._tables[2] < num_rows:
            num_words = num_rows * 2 * width
            tables = self._staged_tables.host[:num_words].view(num_rows, 2, width).numpy()
            rows = [blocks.row for blocks in sequences]
            rows += rows[:1] * (num_rows - len(rows))
            # All blocks that they have: later passes over the same sequences may reach further.
            reach = min(width, max(max(entry[1:]) for entry in held))
            for group, table in enumerate(self._cache.tables):
                tables[:, group, :reach] = table[rows, :reach]
            self._staged_tables.send(num_words)
            self._tables = width, held, num_rows
        return width


def cuda_capture(device: torch.device) -> Capture:
    """Captures on one stream into one pool of memory: replays follow one another and leave nothing in it."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], None], is_first: bool) -> Callable[[], None]:
        caller = torch.cuda.current_stream(device)
        # NOTE: a capture that fails leaves its stream current; this context puts the caller's back.
        with torch.cuda.stream(stream):
            stream.wait_stream(caller)
            run()  # compiles kernels and makes what libraries keep; what it writes is written again
            if is_first:
                _run_without_waiting(run)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                run()
        caller.wait_stream(stream)
        return graph.replay

    return capture


def _run_without_waiting(run: Callable[[], None]) -> None:
    """Raises where `run` waits for the device: a capture that fails there would leave the allocator in disorder.

    This holds for all threads meanwhile, so it is not done without need.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
