"""Whose prediction modules read along, and when those of the others try again.

Modules that propose nothing worth its time must cost nothing. They go to sleep: the sequence goes on as if it had
none, and what it leaves in the prefix cache is without their states. Some time later they begin anew in the middle
of the text, with an empty window, read on for a while and draft again. After every try in vain the engine waits
twice as long, and from the second on new sequences wait as well. Nothing of this can change an answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from stepflash.engine.depth_controller import DepthController
from stepflash.engine.kv_cache import KVCache
from stepflash.engine.request import SamplingParams
from stepflash.engine.sequence import MtpState, Sequence

# Steps of the engine from one try in vain to the next.
FIRST_REST = 256
LONGEST_REST = 4096
# So many right drafts in an answer that ends show that drafts are worth their time.
PROOF = 8


class Rest:
    """How long modules sleep, in steps of the engine, from what came of the last tries."""

    def __init__(self) -> None:
        self._length = FIRST_REST // 2
        self._last_vain = -1
        self._until = 0

    def vain(self, now: int, awake_since: int) -> int:
        """A try that began at step `awake_since` brought nothing; the step of the next."""
        if awake_since >= self._last_vain:  # not one of several side by side
            # Who was of use for longer than the last rest was more than a try.
            was_useful = now - awake_since > max(self._length, FIRST_REST)
            self._length = FIRST_REST if was_useful else min(2 * self._length, LONGEST_REST)
            self._last_vain = now
            self._until = now + self._length
        return max(self._until, now + 1)

    def worked(self) -> None:
        """Drafts were worth their time."""
        self._length, self._until = FIRST_REST // 2, 0

    def for_new(self, now: int) -> int | None:
        """When a new sequence tries for the first time; None for at once."""
        return self._until if self._length > FIRST_REST and now < self._until else None


class Reading:
    """Puts the modules of sequences to sleep and wakes them. `now` is the engine's number of steps so far."""

    def __init__(self, cache: KVCache, depth: DepthController, max_deferred: int, *, is_shared: bool) -> None:
        self._cache = cache
        self._depth = depth
        self._max_deferred = max_deferred
        # Whether prefixes are shared: who drafts at one depth then leaves what others need at theirs.
        self._is_shared = is_shared
        self._rest = Rest()

    def begin(self, seq: Sequence, now: int) -> None:
        """Decide for a new sequence."""
        seq.wakes_at = self._rest.for_new(now) if seq.sampling.draft_depth is None else None
        seq.num_modules = 0 if seq.wakes_at is not None else self._modules_of(seq.sampling)
        seq.awake_since = now
        seq.acceptance = self._depth.prior()

    def wake(self, seqs: Iterable[Sequence], now: int) -> None:
        """Let modules begin anew whose time has come."""
        for seq in seqs:
            if seq.wakes_at is not None and now >= seq.wakes_at:
                self.forget(seq, seq.num_computed)
                seq.wakes_at, seq.awake_since = None, now
                seq.num_modules = self._modules_of(seq.sampling)
                seq.acceptance = self._depth.prior()
                seq.begin_modules()

    def judge(self, seq: Sequence, now: int, *, is_last: bool) -> None:
        """Put modules to sleep whose drafts are not worth their time, where they would have to read now. To be asked
        when no draft is wanted, and when a sequence ends."""
        if not seq.num_modules or seq.sampling.draft_depth is not None:
            return
        if self._depth.is_hopeless(seq.acceptance):
            if is_last or len(seq.token_ids) - seq.mtp.num_computed[0] >= self._max_deferred:
                seq.wakes_at = self._rest.vain(now, seq.awake_since)
                seq.asleep_from = seq.mtp.num_computed[0]
                seq.num_modules, seq.mtp = 0, MtpState()
        elif is_last and sum(seq.stats.num_accepted_tokens) >= PROOF:
            self._rest.worked()

    def forget(self, seq: Sequence, end: int) -> None:
        """Empty what modules that sleep have not written of the slots below `end`, before anybody attends to it."""
        if not seq.num_modules and seq.blocks is not None and seq.asleep_from < end:
            self._cache.clear_modules(seq.blocks, seq.asleep_from, end)
            seq.asleep_from = end

    def _modules_of(self, sampling: SamplingParams) -> int:
        """Modules that read along with a sequence that may draft. All of them where prefixes are shared: the next may
        ask for another depth. Who wants no drafts does not pay for those of others."""
        depth, most = sampling.draft_depth, self._depth.max_depth
        if depth is None or (depth and self._is_shared):
            return most
        return min(depth, most)
