"""Which tokens are computed in the next step.

Every step has a budget of tokens. Running sequences that only wait for their next token come first, with their
drafts; what is left is shared among prompts, shortest first in equal parts, so a long prompt delays a short one
by at most its own share. A waiting sequence starts when its whole prompt fits into the cache, at the expense of
running ones of lower priority if need be. When a running one finds no block, the last in order is preempted: it
gives up its blocks and computes its tokens again later.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from stepflash.engine.kv_cache import FULL, LOOKAHEAD_SLOTS, SLIDING, KVCache, OutOfBlocks, SequenceBlocks
from stepflash.engine.prefix import PrefixCache
from stepflash.engine.sequence import MtpState, Sequence

# Slots for further steps in the same call, where steps are short.
AHEAD_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Compute `num_tokens` of the known tokens of a sequence, and `drafts` after them."""

    seq: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def is_sampled(self) -> bool:
        """True when the last known token is among them, so that a new one can be chosen."""
        return self.num_tokens == self.seq.num_pending


class Scheduler:
    """Waiting and running sequences, both in order of (priority, arrival)."""

    def __init__(
        self,
        cache: KVCache,
        prefix: PrefixCache | None,
        *,
        max_num_batched_tokens: int,
        before_preemption: Callable[[Sequence], None] = lambda seq: None,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_admitted_tokens = 0
        self._cache = cache
        self._prefix = prefix
        self._max_tokens = max_num_batched_tokens
        self._before_preemption = before_preemption

    def add(self, seq: Sequence) -> None:
        bisect.insort(self.waiting, seq, key=_order)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence and free its blocks, wherever it stands."""
        if seq.blocks is not None:
            self._cache.close(seq.blocks)
            seq.blocks = None
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)

    def schedule(self, now: float) -> list[Scheduled]:
        """Plan one step; the slots of everything planned exist. `now` is a time in seconds."""
        # Every running sequence gets at least one token, however many drafts a constraint dictates to others.
        spare = self._max_tokens - len(self.running)
        plan: list[Scheduled] = []
        for seq in list(self.running):
            # NOTE: an earlier turn of this loop may have preempted it.
            if seq.blocks is None or seq.num_pending > 1:
                continue
            drafts = tuple(seq.drafts[:spare])
            if self._reserve(seq, 1 + len(drafts)):
                plan.append(Scheduled(seq, 1, drafts))
                spare -= len(drafts)
        plan = _running(plan)
        while self.waiting and _cost(plan) < self._max_tokens:
            first = self.waiting[0]
            if self._cache.num_free_rows and self._admit(first, now):
                bisect.insort(self.running, self.waiting.pop(0), key=_order)
                if first.num_pending == 1:
                    plan.append(Scheduled(first, 1))
            elif self.running and self.running[-1].request.priority > first.request.priority:
                self.preempt(self.running[-1])
                plan = _running(plan)
            else:
                break
        # Only when everybody has what this step needs.
        for item in plan if not self.waiting else ():
            num_slots = item.seq.num_computed + 1 + len(item.drafts) + LOOKAHEAD_SLOTS
            self._cache.stretch(_blocks(item.seq), num_slots + AHEAD_SLOTS, len(self.running))
        return plan + self._share(self._max_tokens - _cost(plan))

    def _share(self, budget: int) -> list[Scheduled]:
        """Spend the budget on prompts: equal shares, and what short ones leave goes to longer ones."""
        prompts = [seq for seq in self.running if seq.num_pending > 1]
        prompts.sort(key=lambda seq: (seq.request.priority, seq.num_pending))
        plan = []
        for done, seq in enumerate(prompts):
            same = [s for s in prompts[done:] if s.request.priority == seq.request.priority]
            num_tokens = min(seq.num_pending, -(-budget // len(same)))
            if num_tokens > 0:
                # Sliding blocks for one step's tokens are guaranteed by the cache's plan; the full ones
                # were taken when the sequence started.
                self._cache.grow(_blocks(seq), SLIDING, seq.num_computed + num_tokens + LOOKAHEAD_SLOTS)
                plan.append(Scheduled(seq, num_tokens))
                budget -= num_tokens
        return plan

    def _admit(self, seq: Sequence, now: float) -> bool:
        """Start a sequence on what is cached of it, if the rest of its tokens fits."""
        cache = self._cache
        reusable = seq.reusable
        match = self._prefix.match(reusable) if self._prefix else None
        if match is not None and match.snapshot is not None:
            snapshot = match.snapshot
            blocks = cache.open(match.full, snapshot.block_ids, snapshot.first)
            seq.num_computed = match.num_tokens
        else:
            snapshot = None
            blocks = cache.open()
        num_slots = len(seq.token_ids) + LOOKAHEAD_SLOTS
        try:
            cache.grow(blocks, FULL, num_slots)
            cache.grow(blocks, SLIDING, seq.num_computed + 1 + LOOKAHEAD_SLOTS)
            # One spare block per running sequence, or the newcomer would soon cost somebody theirs.
            is_roomy = cache.pools[FULL].num_free >= len(self.running)
            if not is_roomy and self.running:
                cache.evict(FULL, len(self.running))
                is_roomy = cache.pools[FULL].num_free >= len(self.running)
        except OutOfBlocks:
            is_roomy = False
        if not is_roomy:
            cache.close(blocks)
            seq.num_computed = 0
            return False
        seq.blocks = blocks
        seq.boundary = None
        seq.begin_modules(snapshot.carries if snapshot is not None else ())
        self.num_cached_tokens += seq.num_computed
        self.num_admitted_tokens += len(seq.token_ids)
        if seq.started_at is None:
            seq.started_at = now
            seq.stats.queue_seconds = now - seq.submitted_at
            seq.stats.num_cached_tokens = seq.num_computed
            if match is not None:
                is_limited = len(reusable) < len(seq.token_ids)
                seq.stats.cache_miss = "prompt_logprobs need all of it" if is_limited else match.miss
        return True

    def _reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Slots for a decoding sequence, at the expense of the last in order; False if that is itself."""
        num_slots = seq.num_computed + num_tokens + LOOKAHEAD_SLOTS
        while True:
            try:
                self._cache.grow(_blocks(seq), FULL, num_slots)
                self._cache.grow(_blocks(seq), SLIDING, num_slots)
                return True
            except OutOfBlocks:
                victim = self.running[-1]
                self.preempt(victim)
                if victim is seq:
                    return False

    def preempt(self, seq: Sequence) -> None:
        """Back to waiting, without blocks; its tokens, noise and constraint stay as they are."""
        self._before_preemption(seq)
        self.remove(seq)
        seq.num_computed = 0
        seq.drafts = []
        seq.boundary = None
        seq.mtp = MtpState()
        seq.stats.num_preemptions += 1
        self.num_preemptions += 1
        self.add(seq)


def _running(plan: list[Scheduled]) -> list[Scheduled]:
    """Without those that were preempted since."""
    return [item for item in plan if item.seq.blocks is not None]


def _cost(plan: list[Scheduled]) -> int:
    return sum(item.num_tokens + len(item.drafts) for item in plan)


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order


def _blocks(seq: Sequence) -> SequenceBlocks:
    assert seq.blocks is not None
    return seq.blocks
