"""Multi-token prediction at work: draft, verify, accept, and repair what wrong drafts left behind.

In slot terms (see `kv_cache`) the chain of section 4.2 of the model's specification is a plain recurrence: module
k at slot s reads token s and what module k - 1 left at slot s - 1, and predicts token s + 1. With N known tokens
the trunk has computed slots 0 .. N - 2 and every module can be exact up to slot N - 1. `advance` runs each module
once: over all slots that became exact since last time, overwriting what drafts had put there, and then over the
k - 1 slots of the drafts so far, whose last one proposes draft k. Nothing is computed twice on known tokens, and
the edges of prefill chunks need no special case.

A module may be left behind when nobody wants its drafts; what it has to read waits in `MtpState.pending`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from stepflash.engine.batch import Span
from stepflash.engine.constraints import Constraint, allows, as_tensor
from stepflash.engine.kv_cache import KVCache
from stepflash.engine.network import Drafts, NativeNetwork, Network, Pass
from stepflash.engine.sampler import Row, Sampler
from stepflash.engine.sequence import MtpState, Sequence
from stepflash.errors import RequestError

# By module: its first slot to read, and the rows that it read from there on, if it did.
_Feeds = Seq[tuple[int, Tensor | None]]
# Of so few rows a view is kept rather than a copy.
MAX_VIEWED_ROWS = 8


class Walk:
    """Leads a constraint along tokens that may turn out wrong, and back to where it was at the end."""

    def __init__(self, constraint: Constraint | None, sampler: Sampler) -> None:
        self._constraint = constraint
        self._sampler = sampler
        self._num_accepted = 0
        # What is allowed where the walk stands, if that was asked for.
        self._allowed: tuple[Tensor | None] | None = None

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._constraint is not None and self._num_accepted:
            self._constraint.rollback(self._num_accepted)

    def allowed(self) -> Tensor | None:
        """[vocab_limit] bool, or None when every token is allowed."""
        if self._constraint is None:
            return None
        if self._allowed is None:
            self._allowed = (as_tensor(self._constraint.mask(), self._sampler.vocab_limit),)
        return self._allowed[0]

    def is_at_dead_end(self) -> bool:
        """Whether no token at all is allowed here."""
        try:
            self.allowed()
        except RequestError:
            return True
        return False

    def advance(self, token_id: int) -> bool:
        """Follow a token; False, and no step, if the constraint forbids it."""
        if self._constraint is None:
            return True
        if not allows(self._constraint.mask(), token_id):
            return False
        self._constraint.accept(token_id)
        self._num_accepted += 1
        self._allowed = None
        return True


def rows_to_verify(seq: Sequence, drafts: Seq[int], sampler: Sampler) -> list[Row]:
    """What to choose after the last known token and after each draft, should the drafts before it be right."""
    num_tokens = len(seq.token_ids)
    rows = []
    with Walk(seq.restriction(len(drafts) + 1), sampler) as walk:
        allowed = walk.allowed()
        for i in range(len(drafts) + 1):
            rows.append(Row(seq.sampler, num_tokens + i, drafts[:i], allowed, seq.sampling.logprobs))
            if i < len(drafts):
                # Rows behind a draft that cannot be right are never used; they need no mask.
                is_possible = allowed is None or bool(drafts[i] < allowed.shape[0] and allowed[drafts[i]])
                if is_possible and drafts[i] not in seq.stop_ids and walk.advance(drafts[i]):
                    allowed = walk.allowed()
                else:
                    allowed = None
    return rows


def num_accepted(drafts: Seq[int], chosen: Seq[int]) -> int:
    """Drafts are right as long as each is the token that plain decoding chooses in its place.

    Since `chosen` is what plain decoding chooses, the output is the same with any drafts; with Gumbel noise
    fixed by position this holds for sampling too (see `sampler`).
    """
    for i, draft in enumerate(drafts):
        if draft != chosen[i]:
            return i
    return len(drafts)


@dataclass(slots=True, eq=False)
class DraftJob:
    """One sequence for `advance`; all that it changes is kept here until the engine commits it.

    `hidden_states`: the trunk's, of the slots from where the sequence stood before this step to
    `seq.num_computed` - 1. `depth` drafts are wanted. `must_advance` forbids leaving modules behind.
    `snapshots` are block boundaries where a snapshot is wanted; `carries` has what they and the last boundary
    need, where it could be had. No carries are made where `snapshots` is None: nobody keeps states. `ahead` is what
    the trunk's call drafted already (see `depth_ahead`).
    """

    seq: Sequence
    hidden_states: Tensor
    depth: int
    must_advance: bool = False
    snapshots: frozenset[int] | None = frozenset()
    ahead: Drafts | None = None
    drafts: list[int] = field(default_factory=list)
    carries: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    mtp: MtpState = field(init=False)


@dataclass(slots=True, eq=False)
class _Work:
    """A job between modules: `rows` is what the next module reads, from slot `first` on.

    Slots below `available` are exact in the module before; rows beyond belong to drafts.
    """

    job: DraftJob
    walk: Walk
    rows: Tensor | None
    available: int
    depth: int
    num_tokens: int  # of the span that this module runs
    feeds: list[tuple[int, Tensor | None]] = field(default_factory=list)


def wanted_depth(seq: Sequence, adaptive_depth: int) -> int:
    """Drafts that a sequence would like to have, were there no end to it."""
    own = seq.sampling.draft_depth
    if own is None:
        own = adaptive_depth if follows_engine(seq) else 0
    return min(own, seq.num_modules)


def follows_engine(seq: Sequence) -> bool:
    """Whether the engine chooses the depth, and the modules are ready for any."""
    is_ready = seq.num_modules > 0 and len(seq.token_ids) >= seq.drafts_from
    return is_ready and seq.sampling.draft_depth is None


def depth_ahead(seqs: Seq[Sequence], adaptive_depth: int) -> int:
    """The depth to which all these sequences may draft within the trunk's call.

    0 unless they agree, are at their last known token, choose greedily and have modules that have read all known
    tokens, and may say what they like meanwhile: then it is clear before the trunk runs what each module will read.
    """
    depth = wanted_depth(seqs[0], adaptive_depth)
    return depth if depth and all(_may_run_ahead(seq, depth, adaptive_depth) for seq in seqs) else 0


def _may_run_ahead(seq: Sequence, depth: int, adaptive_depth: int) -> bool:
    mtp = seq.mtp
    return (
        wanted_depth(seq, adaptive_depth) == depth
        and seq.num_pending == 1
        and seq.restriction(len(seq.drafts) + 1 + depth) is None
        and seq.sampling.logprobs is None
        and seq.sampler.is_greedy
        and mtp.num_computed[:depth] == [len(seq.token_ids)] * depth
    )


def may_repeat(seq: Sequence, depth: int) -> bool:
    """Whether steps to this depth may follow one another without a look at the sequence: every module drafts, so that
    none gets more to read later, and no constraint has a say."""
    return depth == seq.num_modules and seq.constraint is None


def advance(
    network: Network, cache: KVCache, sampler: Sampler, jobs: Seq[DraftJob], max_deferred: int
) -> None:
    """Bring the modules of each job up to date and propose drafts, one run per module for all jobs together.

    A module that no draft needs is left behind until `max_deferred` slots are waiting.
    """
    ahead = _drafted_ahead(jobs, max_deferred)
    if ahead is not None:
        return _take_drafts(jobs, ahead, cache.block_size)
    waiting = [job for job in jobs if _waits(job, max_deferred)]
    for job in waiting:
        _leave_behind(job, cache.block_size)
    if waiting:
        jobs = [job for job in jobs if job not in waiting]
    is_plain = bool(jobs) and all(_is_plain(job, jobs[0].depth, max_deferred) for job in jobs)
    if is_plain and isinstance(network, NativeNetwork):
        return _take_drafts(jobs, _draft_now(network, jobs), cache.block_size)
    with ExitStack() as stack:
        works = []
        for job in jobs:
            seq = job.seq
            walk = stack.enter_context(Walk(seq.restriction(job.depth), sampler))
            job.mtp = seq.mtp.copy()
            job.drafts, job.carries = [], {}
            rows = _join(seq.mtp.pending[0], job.hidden_states) if seq.num_modules else None
            works.append(_Work(job, walk, rows, seq.num_computed, job.depth, 0))
        for module in range(1, max((job.seq.num_modules for job in jobs), default=0) + 1):
            _run_module(network, cache, sampler, works, module, max_deferred)
    for work in works:
        _keep_carries(work.job, work.feeds, cache.block_size)


def _waits(job: DraftJob, max_deferred: int) -> bool:
    """Whether nobody asks for drafts and so little waits that all modules may be left behind."""
    seq = job.seq
    if not seq.num_modules:
        return True
    if job.depth or job.must_advance:
        return False
    end = min(seq.num_computed + 1, len(seq.token_ids))
    return end - seq.mtp.num_computed[0] < max_deferred


def _leave_behind(job: DraftJob, block_size: int) -> None:
    """Keep what the first module will have to read; nothing else changes."""
    job.mtp, job.drafts, job.carries = job.seq.mtp.copy(), [], {}
    if not job.seq.num_modules:
        return _keep_carries(job, (), block_size)
    before, rows = job.mtp.pending[0], job.hidden_states
    if rows.shape[0]:
        job.mtp.pending[0] = _kept(rows, rows) if before is None else _joined(before, rows)


def _is_plain(job: DraftJob, depth: int, max_deferred: int) -> bool:
    """True when `depth` modules draft, greedily, over whatever they have to read, and no other module must run."""
    seq = job.seq
    num_known, mtp = len(seq.token_ids), seq.mtp
    if not (
        job.depth == depth > 0
        and seq.restriction(depth) is None
        and seq.sampler.is_greedy
        and num_known == seq.num_computed + 1
    ):
        return False
    if _runs_further(job, depth, max_deferred):
        return False
    num_rows = job.hidden_states.shape[0]
    for k, (start, pending) in enumerate(zip(mtp.num_computed[:depth], mtp.pending, strict=False)):
        num_rows += 0 if pending is None else pending.shape[0]
        if num_rows != num_known + k - start:
            return False
    return True


def _runs_further(job: DraftJob, depth: int, max_deferred: int) -> bool:
    """Whether a module must run that is not one of the first `depth`."""
    seq = job.seq
    return depth < seq.num_modules and (
        job.must_advance or len(seq.token_ids) - seq.mtp.num_computed[depth] >= max_deferred
    )


def _drafted_ahead(jobs: Seq[DraftJob], max_deferred: int) -> Drafts | None:
    """What the trunk's call drafted, if it did so for these very jobs and to this depth."""
    ahead = jobs[0].ahead if jobs else None
    if ahead is None:
        return None
    depth = jobs[0].depth
    for job in jobs:
        if job.ahead is not ahead or job.depth != depth or _runs_further(job, depth, max_deferred):
            return None
    return ahead if len(ahead.token_ids) == len(jobs) * depth else None


def _draft_now(network: NativeNetwork, jobs: Seq[DraftJob]) -> Drafts:
    modules = range(jobs[0].depth)
    states = [job.seq.mtp for job in jobs]
    first = [min(state.num_computed[: len(modules)]) for state in states]
    nothing = jobs[0].hidden_states[:0]
    pending = [state.pending[k] for k in modules for state in states]
    return network.draft(
        [job.hidden_states for job in jobs],
        [nothing if rows is None else rows for rows in pending],
        [state.num_computed[k] for k in modules for state in states],
        [job.seq.token_ids[start:] for job, start in zip(jobs, first, strict=True)],
        first,
        [len(job.seq.token_ids) for job in jobs],
        [job.seq.blocks.row for job in jobs],  # type: ignore[union-attr]
    )


def _take_drafts(jobs: Seq[DraftJob], done: Drafts, block_size: int) -> None:
    """What the loop over `_run_module` comes to for plain jobs of one depth that drafted in one call."""
    depth, count = jobs[0].depth, len(jobs)
    for j, job in enumerate(jobs):
        seq, before = job.seq, job.seq.mtp
        known, starts = len(seq.token_ids), before.num_computed
        job.mtp, job.drafts, job.carries = before.copy(), [], {}
        for k in range(depth):
            job.mtp.num_computed[k] = max(starts[k], known)  # the first slots of a module hold nothing
            job.mtp.pending[k] = None
            if k > 0 and starts[k] <= known:
                if done.unread is not None:
                    job.mtp.pending[k] = done.unread[(k - 1) * count + j]
                else:
                    job.mtp.pending[k] = _exact_rows(
                        _rows(jobs, j, k, done.rows, done), known, starts[k], known
                    )
        for draft, logit in zip(done.token_ids[j::count], done.logits[j::count], strict=True):
            if not math.isfinite(logit):
                break
            job.drafts.append(draft)
            if draft in seq.stop_ids:  # nothing follows a stop token
                break
        if depth < seq.num_modules:  # the first that stays behind has more to read now
            rows = _join(before.pending[depth], _rows(jobs, j, depth - 1, done.hidden_states, done))
            job.mtp.pending[depth] = _exact_rows(rows, known, starts[depth], starts[depth])
        elif not job.snapshots and seq.num_computed // block_size * block_size < min(starts):
            continue  # no boundary among the slots that were read
        if job.snapshots is None:
            continue  # and nobody would ask for the states there
        feeds = [
            (start, _rows(jobs, j, k, done.rows, done) if k < depth else None)
            for k, start in enumerate(starts)
        ]
        _keep_carries(job, feeds, block_size)


def _rows(jobs: Seq[DraftJob], j: int, k: int, states: Seq[Tensor], done: Drafts) -> Tensor:
    """Of states by module, those of job j in the module after k others, when all drafted in one call."""
    counts = [len(job.seq.token_ids) + k - job.seq.mtp.num_computed[k] for job in jobs[: j + 1]]
    begin = sum(counts[:j]) if done.begins is None else done.begins[k][j]
    return states[k][begin : begin + counts[j]]


def _run_module(
    network: Network,
    cache: KVCache,
    sampler: Sampler,
    works: Seq[_Work],
    module: int,
    max_deferred: int,
) -> None:
    spans: list[Span] = []
    inputs: list[Tensor] = []
    active: list[_Work] = []
    for work in works:
        seq, mtp = work.job.seq, work.job.mtp
        if seq.num_modules < module:
            continue
        start = mtp.num_computed[module - 1]
        # Slots below `end` are exact after this run. Of a finished sequence every token may be computed.
        end = max(start, min(work.available + 1, seq.num_computed + 1, len(seq.token_ids)))
        token_ids = seq.token_ids[start:end]
        if work.depth >= module:
            token_ids += work.job.drafts[max(0, start - len(seq.token_ids)) : module - 1]
        wanted = work.depth >= module or work.job.must_advance or end - start >= max_deferred
        work.num_tokens = len(token_ids) if wanted else 0
        if not work.num_tokens:
            work.depth = min(work.depth, module - 1)
        work.job.mtp.pending[module - 1] = _exact_rows(
            work.rows, work.available, start, end if work.num_tokens else start
        )
        work.feeds.append((start, work.rows if work.num_tokens else None))
        if work.num_tokens:
            assert work.rows is not None
            mtp.num_computed[module - 1] = end
            spans.append(Span(seq.blocks, start, token_ids))  # type: ignore[arg-type]
            inputs.append(work.rows[: work.num_tokens])
            active.append(work)
    outputs: list[Tensor] = []
    if active:
        ends = list(accumulate(work.num_tokens for work in active))
        drafting = [i for i, work in enumerate(active) if work.depth >= module]
        previous = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        done = network.module(module, spans, previous, [ends[i] - 1 for i in drafting])
        counts = [work.num_tokens for work in active]
        outputs = [done.hidden_states] if len(counts) == 1 else list(torch.split(done.hidden_states, counts))
        if drafting:
            _draft(sampler, [active[i] for i in drafting], done, module)
    after = dict(zip(map(id, active), outputs, strict=True))
    for work in works:
        mtp = work.job.mtp
        if work.job.seq.num_modules > module:
            work.rows = _join(mtp.pending[module], after.get(id(work)))
            work.available = mtp.num_computed[module - 1]


def _draft(sampler: Sampler, drafting: Seq[_Work], done: Pass, module: int) -> None:
    """Propose draft `module` for every job that wants it; `done` has a row of logits for each."""
    rows = [
        Row(
            work.job.seq.sampler,
            len(work.job.seq.token_ids) + module - 1,
            tuple(work.job.drafts),
            work.walk.allowed(),
        )
        for work in drafting
    ]
    choice = sampler.choose(done.logits, rows, lambda: done.greedy)
    for work, draft, is_finite in zip(drafting, choice.token_ids, choice.is_finite, strict=True):
        if not is_finite:
            work.depth = module - 1
            continue
        work.job.drafts.append(draft)
        # Nothing follows a stop token, and a constraint is not led beyond it.
        if draft in work.job.seq.stop_ids or not work.walk.advance(draft):
            work.depth = module
        elif work.walk.is_at_dead_end():
            # Whoever takes this token fails, but only who does; it must not be a guess that fails.
            work.job.drafts.pop()
            work.depth = module - 1


def _exact_rows(rows: Tensor | None, available: int, start: int, end: int) -> Tensor | None:
    """What a module still has to read for slots `end` and up, of exact rows; `rows` are for slots `start` and up."""
    if rows is None:
        return None
    left = rows[end - start : available - (start - 1)]
    return _kept(left, rows) if left.shape[0] else None


def _kept(rows: Tensor, whole: Tensor) -> Tensor:
    """Rows of `whole` to be kept for later: a view of many would keep the states of a whole prompt chunk alive."""
    return rows.clone() if whole.shape[0] > MAX_VIEWED_ROWS else rows


def _keep_carries(job: DraftJob, feeds: _Feeds, block_size: int) -> None:
    """At each wanted boundary P: the states of slot P - 1 that the modules read for slot P.

    Modules may pass the last boundary in different steps, so each one's state there is kept.
    """
    if job.snapshots is None:
        return
    last = job.seq.num_computed // block_size * block_size
    for boundary in job.snapshots | {last}:
        carries, began_behind = [], False
        for k, (start, rows) in enumerate(feeds):
            kept = job.mtp.at_last_boundary[k]
            if rows is not None and 0 <= boundary - start < rows.shape[0]:
                row = rows[boundary - start : boundary - start + 1].clone()
                if boundary == last:
                    job.mtp.at_last_boundary[k] = last, row
                carries.append(row)
            elif kept is not None and kept[0] == boundary:
                carries.append(kept[1])
            else:
                # A module that began in the middle of the text has nothing there: the snapshot is without.
                began_behind = began_behind or start > boundary
        if len(carries) == job.seq.num_modules:
            job.carries[boundary] = tuple(carries)
        elif began_behind:
            job.carries[boundary] = ()


def _join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return _joined(first, second)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both. torch would copy more than 64 KB with several threads, which then look out for more work and keep
    the kernels' own from theirs (see `stepflash/__init__.py`)."""
    if first.device.type != "cpu":
        return torch.cat((first, second))
    parts = [rows.contiguous().view(torch.uint8).numpy() for rows in (first, second)]
    return torch.from_numpy(np.concatenate(parts)).view(first.dtype)
