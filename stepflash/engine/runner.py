"""Runs the network on what the scheduler planned. Reads sequences and never changes them.

Whatever goes wrong here leaves every sequence as it was (the cache slots written belong to tokens that are not
computed yet), so the engine can run the same plan again one sequence at a time to find the culprit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from stepflash.engine.batch import Span
from stepflash.engine.cuda_graphs import GraphNetwork
from stepflash.engine.kv_cache import KVCache
from stepflash.engine.network import Ahead, Drafts, ModelNetwork, NativeNetwork, Network
from stepflash.engine.request import TokenLogprob
from stepflash.engine.sampler import Choice, Row, Sampler, token_logprobs
from stepflash.engine.scheduler import Scheduled
from stepflash.engine.sequence import Sequence
from stepflash.engine.speculative import (
    DraftJob,
    advance,
    depth_ahead,
    may_repeat,
    num_accepted,
    rows_to_verify,
)
from stepflash.errors import EngineError
from stepflash.kernels import build
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.quantized import QuantDecoderLayer, QuantMTPLayer

# Rows of logits at a time where the prompt's are wanted: a whole chunk of them could be a gigabyte.
PROMPT_ROWS = 32


@dataclass(frozen=True, slots=True)
class TrunkResult:
    """What the trunk said about one scheduled sequence.

    `token_ids`: accepted drafts and one more token; empty while the prompt is not finished. `hidden_states`
    [tokens computed for good, hidden_size] are the trunk's, from slot `seq.num_computed` on. `ahead`: the next
    drafts of all sequences, where they were made in the same call. `earlier`: the tokens of steps that were taken
    before this one in the same call, all but the first with `num_drafts` drafts; `pending`: after those, what each
    module from the second has yet to read. `prompt_logprobs`: those that were not known yet, where they are wanted.
    """

    seq: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    num_drafts: int
    num_accepted: int
    hidden_states: Tensor
    ahead: Drafts | None = None
    earlier: Seq[list[int]] = ()
    pending: Seq[Tensor] = ()
    prompt_logprobs: Seq[TokenLogprob] = ()


def make_network(model: Step3p5ForCausalLM, cache: KVCache, vocab_limit: int) -> Network:
    """The fastest network that this model and cache allow."""
    layers = model.model.layers
    is_packed = all(isinstance(layer, QuantDecoderLayer | QuantMTPLayer) for layer in layers)
    is_native = all(layer.is_native for layer in cache.layers.values())
    if is_packed and is_native and cache.device.type == "cpu" and build.load():
        return NativeNetwork(model, cache, vocab_limit)
    if is_packed and cache.device.type == "cuda":
        return GraphNetwork(model, cache, vocab_limit)
    return ModelNetwork(model, cache)


class Runner:
    """A model, its cache and its sampler."""

    def __init__(
        self, model: Step3p5ForCausalLM, cache: KVCache, sampler: Sampler, max_deferred: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.network = make_network(model, cache, sampler.vocab_limit)
        self._max_deferred = max_deferred

    @property
    def num_captured(self) -> int:
        """See `GraphNetwork`."""
        return self.network.num_captured if isinstance(self.network, GraphNetwork) else 0

    def run_trunk(
        self,
        plan: Seq[Scheduled],
        adaptive_depth: int = 0,
        max_steps: int = 1,
        *,
        single_blocks: bool = False,
    ) -> list[TrunkResult]:
        """Compute the planned tokens, and choose tokens where a sequence's last known one was among them.

        `adaptive_depth` is the depth of sequences that leave it to the engine; where that and the state of the
        modules allow it, the next drafts are made in the same call, and up to `max_steps` short steps are taken in
        it, with `single_blocks` none after one that fills a block.

        Raises:
            EngineError: the logits of a sequence are not finite.
        """
        spans = [
            Span(
                item.seq.blocks,  # type: ignore[arg-type]
                item.seq.num_computed,
                [*item.seq.token_ids[item.seq.num_computed :][: item.num_tokens], *item.drafts],
            )
            for item in plan
        ]
        lengths = [len(span.token_ids) for span in spans]
        verified: Seq[Seq[int]] = [item.drafts for item in plan]
        logprobs: list[TokenLogprob | None] = []
        ahead = self._run_ahead(plan, spans, adaptive_depth, max_steps, single_blocks)
        if ahead is not None:
            done, verified = ahead.trunk, ahead.verified
            lengths = [1 + len(drafts) for drafts in verified]
            assert done.greedy is not None
            chosen, best_logits = done.greedy
            is_finite = [math.isfinite(logit) for logit in best_logits]
        else:
            rows: list[Row] = []
            row_indices: list[int] = []
            for item, end in zip(plan, accumulate(lengths), strict=True):
                if item.is_sampled:
                    rows += rows_to_verify(item.seq, item.drafts, self.sampler)
                    row_indices += range(end - len(item.drafts) - 1, end)
            done = self.network.trunk(spans, row_indices)
            choice = Choice([], [])
            if rows:
                choice = self.sampler.choose(done.logits, rows, lambda: done.greedy)
            chosen, logprobs, is_finite = choice.token_ids, choice.logprobs, choice.is_finite
        hidden_states = done.hidden_states
        results, row, end = [], 0, 0
        for i, item in enumerate(plan):
            start, end = end, end + lengths[i]
            of_prompt: list[TokenLogprob] = []
            if item.seq.sampling.prompt_logprobs is not None:
                of_prompt = self._prompt_logprobs(item, hidden_states[start:end])
            if not item.is_sampled:
                results.append(
                    TrunkResult(item.seq, [], [], 0, 0, hidden_states[start:end], prompt_logprobs=of_prompt)
                )
                continue
            count = len(verified[i])
            accepted = num_accepted(verified[i], chosen[row : row + count])
            kept = slice(row, row + accepted + 1)
            # What stands behind a wrong draft is nobody's logits.
            if not all(is_finite[kept]):
                raise EngineError("the model produced logits that are not finite numbers")
            results.append(
                TrunkResult(
                    item.seq,
                    chosen[kept],
                    [entry for entry in logprobs[kept] if entry is not None],
                    count,
                    accepted,
                    hidden_states[start : end - count + accepted],
                    ahead.drafts if ahead else None,
                    [step[i] for step in ahead.earlier] if ahead else (),
                    ahead.pending[i :: len(plan)] if ahead else (),
                    of_prompt,
                )
            )
            row += count + 1
        return results

    def _prompt_logprobs(self, item: Scheduled, hidden_states: Tensor) -> list[TokenLogprob]:
        """Of the tokens of the prompt that follow those just computed, as far as they are wanted and not known."""
        seq, found = item.seq, list[TokenLogprob]()
        num_top, start = seq.sampling.prompt_logprobs, seq.num_computed
        assert num_top is not None
        end = min(start + item.num_tokens, seq.num_prompt_tokens - 1)
        for begin in range(max(start, len(seq.prompt_logprobs)), end, PROMPT_ROWS):
            rows = slice(begin, min(begin + PROMPT_ROWS, end))
            logits = self.model.compute_logits(hidden_states[rows.start - start : rows.stop - start])
            found += token_logprobs(logits, seq.token_ids[rows.start + 1 : rows.stop + 1], num_top)
        if not all(math.isfinite(entry.logprob) for entry in found):
            raise EngineError("the model produced logits that are not finite numbers")
        return found

    def _run_ahead(
        self, plan: Seq[Scheduled], spans: Seq[Span], adaptive_depth: int, max_steps: int, single_blocks: bool
    ) -> Ahead | None:
        """The trunk with the next drafts in one call; None where that cannot be."""
        network = self.network
        if not isinstance(network, NativeNetwork | GraphNetwork):
            return None
        seqs = [item.seq for item in plan]
        depth = depth_ahead(seqs, adaptive_depth)
        if not depth:
            return None
        pending = [seq.mtp.pending[k] for k in range(1, depth) for seq in seqs]
        if isinstance(network, GraphNetwork):
            return network.trunk_ahead(spans, pending, depth)
        if max_steps > 1 and not all(may_repeat(seq, depth) for seq in seqs):
            max_steps = 1
        rooms = [seq.max_tokens - seq.num_generated for seq in seqs]
        stop_ids = list(seqs[0].stop_ids.union(*(seq.stop_ids for seq in seqs[1:])))
        return network.trunk_ahead(spans, rooms, stop_ids, pending, depth, max_steps, single_blocks)

    def run_modules(self, jobs: Seq[DraftJob]) -> None:
        """Advance the MTP modules of these jobs and fill in their drafts, states and carries."""
        advance(self.network, self.cache, self.sampler, jobs, self._max_deferred)
