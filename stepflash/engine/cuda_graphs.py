"""Small passes of a packed model on a CUDA device, captured once and replayed as CUDA graphs.

With few tokens the kernels of a pass take less time than their launches from Python. There is a graph for each of a
few sizes that come up: the module, the number of tokens, and how many blocks of a sequence the tables have room for.

Tokens that are missing are filled up by repeating the first one, each as a sequence of its own that writes nothing
(slot -1): they meet the same experts, so they read no other weights. Sequences that are missing have no tokens.
Passes too large, or without logits, and models that cannot be captured go through `ModelNetwork`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from stepflash.engine.batch import Span, TokenBatch, token_rows
from stepflash.engine.cuda_ahead import AheadPasses
from stepflash.engine.cuda_forward import forward_of
from stepflash.engine.cuda_replay import (
    MOST,
    SIZES,
    Capture,
    Graphs,
    Staged,
    Tables,
    cuda_capture,
    round_up,
    size_for,
)
from stepflash.engine.kv_cache import KVCache
from stepflash.engine.network import Ahead, Greedy, ModelNetwork, Pass
from stepflash.kernels import ops
from stepflash.model.transformer import Step3p5ForCausalLM


class _Tokens:
    """What a pass of `size` tokens reads but for its tables, as views of the host's and of the device's words.

    per_token [5, size] int64: ids, positions, slots of both groups, and of which tokens logits are wanted.
    """

    def __init__(self, staged: Staged, size: int) -> None:
        stride = round_up(size, 8)
        begins = [0, *accumulate((10 * stride, round_up(size + 1, 8), round_up(size, 8)))]
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
        self._forward = forward_of(model, cache)
        self._graphs = Graphs(cuda_capture(cache.device) if capture is None else capture)
        self._tables = Tables(cache)
        self._ahead = AheadPasses(model, cache, vocab_limit, self._forward, self._graphs, self._tables)
        device, dtype = cache.device, model.model.embed_tokens.weight.dtype
        self._staged = Staged(16 * MOST, device)
        self._tokens = {size: _Tokens(self._staged, size) for size in SIZES}
        hidden_size, vocab_size = model.config.hidden_size, model.config.vocab_size
        self._previous = torch.zeros((MOST, hidden_size), dtype=dtype, device=device)
        self._hidden_states = torch.zeros((MOST, hidden_size), dtype=dtype, device=device)
        self._logits = torch.zeros((MOST, vocab_size), dtype=torch.float32, device=device)
        # Best tokens, and the bits of their logits: one transfer to the host.
        self._best = torch.zeros((2, MOST), dtype=torch.int32, device=device)

    @property
    def num_captured(self) -> int:
        """Passes captured since the start; a step that captures takes long, once."""
        return self._graphs.num_captured

    def trunk(self, spans: Sequence[Span], rows: Sequence[int]) -> Pass:
        return self._run(0, spans, None, rows) or self._eager.trunk(spans, rows)

    def module(self, module: int, spans: Sequence[Span], previous: Tensor, rows: Sequence[int]) -> Pass:
        return self._run(module, spans, previous, rows) or self._eager.module(module, spans, previous, rows)

    def trunk_ahead(
        self, spans: Sequence[Span], pending: Sequence[Tensor | None], depth: int
    ) -> Ahead | None:
        """See `AheadPasses.run`."""
        return self._ahead.run(spans, pending, depth)

    def _run(
        self, module: int, spans: Sequence[Span], previous: Tensor | None, rows: Sequence[int]
    ) -> Pass | None:
        """None where this pass has no graph."""
        num_tokens = sum(len(span.token_ids) for span in spans)
        if self._graphs.is_off or not rows or num_tokens > MOST:
            return None
        size = size_for(num_tokens)
        width = self._send(module, spans, rows, size)
        if previous is not None:
            self._previous[:num_tokens] = previous
            if num_tokens < size:
                self._previous[num_tokens:size] = previous[0]
        key = module, size, width
        if not self._graphs.run(key, partial(self._compute, *key)):
            return None
        # The engine keeps rows of it for later passes.
        hidden_states = self._hidden_states[:num_tokens].clone()
        return Pass(hidden_states, self._logits[: len(rows)], partial(self._greedy, len(rows)))

    def _greedy(self, num_rows: int) -> Greedy:
        best = self._best.cpu()[:, :num_rows]
        return best[0].tolist(), best[1].view(torch.float32).tolist()

    def _compute(self, module: int, size: int, width: int) -> None:
        """The pass, from buffers to buffers. It depends on nothing else, and waits for nothing."""
        tokens, model = self._tokens[size], self._model
        tables = self._tables.views(size, width)
        batch = TokenBatch(tokens.per_token[:4], tokens.cu_seqlens, tokens.context_lens, tables)
        if module:
            hidden_states = self._forward.module(module, batch.input_ids, self._previous[:size], batch)
            logits = model.mtp_compute_logits(module, hidden_states[tokens.per_token[4]])
        else:
            hidden_states = self._forward.trunk(batch)
            logits = model.compute_logits(hidden_states[tokens.per_token[4]])
        ids, values = ops.best_tokens(logits, self._vocab_limit)
        self._hidden_states[:size] = hidden_states
        self._logits[:size] = logits
        self._best[0, :size] = ids
        self._best[1, :size].view(torch.float32).copy_(values)

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
        num_slots = max(contexts)
        contexts += [spans[0].start + 1] * missing + [0] * no_seqs
        tokens = self._tokens[size]
        self._staged.wait()
        tokens.host[0][:] = [*per_token, [*rows, *[0] * (size - len(rows))]]
        tokens.host[1][:], tokens.host[2][:] = bounds, contexts
        self._staged.send(tokens.num_words)
        return self._tables.send([span.blocks for span in spans], len(spans) + missing, num_slots)
