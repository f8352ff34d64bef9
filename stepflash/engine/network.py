"""One pass of the trunk or of a prediction module: tokens in, hidden states and logits out.

`ModelNetwork` runs the model's own modules, whatever they are made of and wherever they are. `NativeNetwork` runs
a packed model on the CPU as one native call: with small models and single tokens, the calls between operations
would cost more than the operations. Both give a token the same result whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from stepflash.engine.batch import Span, build_batch
from stepflash.engine.cuda_forward import forward_of
from stepflash.engine.kv_cache import KVCache
from stepflash.model.config import RopeConfig
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.quantized import QuantDecoderLayer, QuantLinear, QuantMTPLayer

Greedy = tuple[list[int], list[float]]


class Pass:
    """hidden_states [num_tokens, hidden_size] before the final norm; logits [num_rows, vocab_size] float32."""

    __slots__ = ("_greedy", "hidden_states", "logits")

    def __init__(
        self, hidden_states: Tensor, logits: Tensor, greedy: Greedy | Callable[[], Greedy] | None = None
    ) -> None:
        self.hidden_states, self.logits, self._greedy = hidden_states, logits, greedy

    @property
    def greedy(self) -> Greedy | None:
        """Each row's best token below the vocabulary limit and its logit, where they come for free.

        To be asked for before the next pass; on a GPU this waits for the pass.
        """
        if callable(self._greedy):
            self._greedy = self._greedy()
        return self._greedy


# Whoever comes or goes while steps are taken in one call waits for so long, or for one step.
AHEAD_SECONDS = 0.004
# Of a pass that has no logits to show.
_NONE = torch.empty((0, 0))


class Network(Protocol):
    """What the engine runs. `rows` are the tokens of all spans, end to end, whose logits are wanted; ascending."""

    def trunk(self, spans: Sequence[Span], rows: Sequence[int]) -> Pass: ...

    def module(self, module: int, spans: Sequence[Span], previous: Tensor, rows: Sequence[int]) -> Pass:
        """MTP module 1, 2 or 3; `previous` [num_tokens, hidden_size] is what the one before it left."""
        ...


@dataclass(frozen=True, slots=True)
class Drafts:
    """What all modules in a row left, by module: rows read and hidden states, then each job's draft and its logit.

    Of the last of all modules, whose hidden states nobody reads, there may be just each job's last row. `begins`: by
    module, where each job's rows begin, if there is room between them. `unread`: by module from the second, then by
    job, the row [1, hidden_size] that it reads next, where that is known already.
    """

    rows: Sequence[Tensor]
    hidden_states: Sequence[Tensor]
    token_ids: list[int]
    logits: list[float]
    begins: Sequence[Sequence[int]] | None = None
    unread: Sequence[Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Ahead:
    """Steps of greedy decoding with drafts that were taken in one call.

    `earlier`: the new tokens of all steps but the last, by step, then by span. `verified`: the drafts of each span in
    the last step. `trunk` is of the last step, without logits, but with every token's best; `drafts` is what comes
    next, if every sequence goes on. `pending`: before the last step, by module from the second, then by span, the row
    that the module reads next.
    """

    earlier: Sequence[Sequence[list[int]]]
    verified: Sequence[Sequence[int]]
    trunk: Pass
    drafts: Drafts | None
    pending: Sequence[Tensor] = ()


class ModelNetwork:
    """Runs the model's modules over the cache."""

    def __init__(self, model: Step3p5ForCausalLM, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._forward = forward_of(model, cache)

    def trunk(self, spans: Sequence[Span], rows: Sequence[int]) -> Pass:
        batch = build_batch(self._cache, spans)
        hidden_states = self._forward.trunk(batch)
        if not rows:
            return Pass(hidden_states, _no_logits(hidden_states))
        return Pass(hidden_states, self._model.compute_logits(_select(hidden_states, rows)))

    def module(self, module: int, spans: Sequence[Span], previous: Tensor, rows: Sequence[int]) -> Pass:
        batch = build_batch(self._cache, spans, shift=module)
        hidden_states = self._forward.module(module, batch.input_ids, previous, batch)
        if not rows:
            return Pass(hidden_states, _no_logits(hidden_states))
        return Pass(hidden_states, self._model.mtp_compute_logits(module, _select(hidden_states, rows)))


class NativeNetwork:
    """Runs a packed model over the cache with one native call a pass."""

    def __init__(self, model: Step3p5ForCausalLM, cache: KVCache, vocab_limit: int) -> None:
        num_layers, num_modules = model.config.num_layers, cache.limits.num_modules
        layers = [
            layer for layer in model.model.layers if isinstance(layer, QuantDecoderLayer | QuantMTPLayer)
        ]
        self.num_modules = num_modules
        self._cache = cache
        self._passes = [_new_network(model, cache, layers[:num_layers], 0)]
        self._passes[0].set_head(*_head(model.model.norm, model.lm_head), vocab_limit)
        for index, layer in enumerate(layers[num_layers : num_layers + num_modules], start=num_layers):
            native = _new_network(model, cache, [layer], index)
            assert isinstance(layer, QuantMTPLayer)
            join: Any = layer.eh_proj
            native.set_join(layer.enorm.weight, layer.hnorm.weight, join.weight.packed, int(join.weight.fmt))
            native.set_head(*_head(layer.head_norm, layer.head), vocab_limit)
            self._passes.append(native)
        for native, following in pairwise(self._passes):
            native.set_next(following)
        tables = [torch.from_numpy(table) for table in cache.tables]
        for native in self._passes:
            native.set_tables(*tables, cache.block_size)

    def trunk(self, spans: Sequence[Span], rows: Sequence[int]) -> Pass:
        return self._run(0, spans, None, rows)

    def module(self, module: int, spans: Sequence[Span], previous: Tensor, rows: Sequence[int]) -> Pass:
        return self._run(module, spans, previous, rows)

    def draft(
        self,
        hidden_states: Sequence[Tensor],
        pending: Sequence[Tensor],
        starts: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        first_slots: Sequence[int],
        num_known: Sequence[int],
        table_rows: Sequence[int],
    ) -> Drafts:
        """All modules in a row, each drafting greedily for every job; see `draft` in csrc/network_class.cpp."""
        offsets = [0, *accumulate(map(len, token_ids))][:-1]
        flat = token_ids[0] if len(token_ids) == 1 else list(chain.from_iterable(token_ids))
        rows, left, best, logits, unread = self._passes[1].draft(
            hidden_states, pending, starts, flat, offsets, first_slots, num_known, table_rows
        )
        return Drafts(rows, left, best, logits, unread=unread)

    def trunk_ahead(
        self,
        spans: Sequence[Span],
        rooms: Sequence[int],
        stop_ids: Sequence[int],
        pending: Sequence[Tensor | None],
        depth: int,
        max_steps: int,
        single_blocks: bool,
    ) -> Ahead:
        """The trunk over spans of a token and its drafts, and the next drafts if all goes on; and so on for
        `max_steps` steps at most, as long as they are short. See `run_ahead` in csrc/network_class.cpp."""
        token_ids, lengths, starts, table_rows = _flat(spans)
        reaches = [self._cache.num_slots(span.blocks) for span in spans]
        limits = max_steps, AHEAD_SECONDS, single_blocks
        before, last, after = self._passes[0].run_ahead(
            token_ids, lengths, starts, table_rows, rooms, reaches, stop_ids, pending, depth, *limits
        )
        earlier, counts, verified, unread_before = before
        hidden_states, best, best_logits = last
        rows, left, drafts, logits, unread = after
        return Ahead(
            _by_step(earlier, counts, len(spans)),
            [span.token_ids[1:] for span in spans]
            if not earlier
            else [verified[at + 1 : at + 1 + depth] for at in range(0, len(verified), 1 + depth)],
            Pass(hidden_states, _NONE, (best, best_logits)),
            Drafts(rows, left, drafts, logits, unread=unread) if drafts else None,
            unread_before if earlier else (),
        )

    def _run(self, module: int, spans: Sequence[Span], previous: Tensor | None, rows: Sequence[int]) -> Pass:
        hidden_states, logits, *greedy = self._passes[module].run(*_flat(spans), module, previous, rows)
        return Pass(hidden_states, logits, greedy)


def _new_network(
    model: Step3p5ForCausalLM, cache: KVCache, layers: Sequence[QuantDecoderLayer | QuantMTPLayer], first: int
) -> Any:
    """A torch.classes.stepflash.Network (csrc/network_class.cpp) with these layers, the first of index `first`."""
    ropes: list[RopeConfig] = list(dict.fromkeys(layer.rope for layer in layers))
    frequencies = [model.rope_frequencies[rope].contiguous() for rope in ropes]
    embedding, eps = model.model.embed_tokens.weight, model.config.rms_norm_eps
    native = torch.classes.stepflash.Network(embedding, eps, frequencies)
    for index, layer in enumerate(layers, start=first):
        attention, block, cached = layer.attention, layer.feed_forward, cache.layers[index]
        norms = [attention.norm_weight, attention.q_norm, attention.k_norm, block.norm_weight]
        projections: list[Any] = [*attention.projections, attention.o_proj]
        caches = [cached.keys, cached.values, cached.k_scale, cached.v_scale]
        native.add_layer(
            norms,
            [p.packed for p in projections],
            [int(p.fmt) for p in projections],
            [attention.num_heads, attention.num_kv_heads, attention.head_dim],
            [ropes.index(layer.rope), cached.group, cached.window or 0, cached.first_slot],
            [tensor for tensor in caches if tensor is not None],
        )
        native.set_feed_forward(*block.native_arguments())
    return native


def _flat(spans: Sequence[Span]) -> tuple[Sequence[int], list[int], list[int], list[int]]:
    """Token ids end to end, and of each span its length, its first slot and its row in the block tables."""
    if len(spans) == 1:
        (span,) = spans
        return span.token_ids, [len(span.token_ids)], [span.start], [span.blocks.row]
    return (
        [i for span in spans for i in span.token_ids],
        [len(span.token_ids) for span in spans],
        [span.start for span in spans],
        [span.blocks.row for span in spans],
    )


def _by_step(token_ids: list[int], counts: list[int], num_spans: int) -> list[list[list[int]]]:
    """Tokens that lie end to end, step by step, then span by span."""
    ends = [0, *accumulate(counts)]
    parts = [token_ids[start:end] for start, end in pairwise(ends)]
    return [parts[i : i + num_spans] for i in range(0, len(parts), num_spans)]


def _head(norm: Any, head: Any) -> tuple[Tensor, Tensor, int]:
    assert isinstance(head, QuantLinear)
    return norm.weight, head.weight.packed, int(head.weight.fmt)


def _select(hidden_states: Tensor, rows: Sequence[int]) -> Tensor:
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return hidden_states[first : last + 1]  # nothing has to be told to the device
    return hidden_states[torch.tensor(rows, dtype=torch.long, device=hidden_states.device)]


def _no_logits(hidden_states: Tensor) -> Tensor:
    return hidden_states.new_empty((0, 0), dtype=torch.float32)
