"""The engine without threads: `add` requests, call `step` until nothing is left, take the outputs.

A step is schedule, trunk, commit, MTP modules, commit. Failures stay with the request that caused them: whatever
a batch raises, it is run again one sequence at a time, and only those that fail alone end with an error.
Invariant: when no request is left, no block is held but by the prefix cache (`check_integrity`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch

from stepflash.engine.config import EngineConfig, EngineStats
from stepflash.engine.depth_controller import DepthController
from stepflash.engine.disk import origin
from stepflash.engine.kv_cache import FULL, LOOKAHEAD_SLOTS, MAX_MODULES, SNAPSHOT_SHARE, CacheLimits, KVCache
from stepflash.engine.prefix import PrefixCache
from stepflash.engine.reading import Reading
from stepflash.engine.request import (
    CacheLookup,
    FinishReason,
    Output,
    Request,
    RequestStats,
)
from stepflash.engine.runner import Runner, TrunkResult
from stepflash.engine.sampler import Sampler
from stepflash.engine.saver import Saver
from stepflash.engine.scheduler import Scheduled, Scheduler
from stepflash.engine.sequence import MtpState, Sequence
from stepflash.engine.speculative import DraftJob, follows_engine, wanted_depth
from stepflash.errors import ConfigError, EngineError, PromptTooLong, QueueFull, RequestError, StepflashError
from stepflash.model.transformer import Step3p5ForCausalLM

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
# Most tokens that a constraint may dictate in one step.
MAX_FORCED_TOKENS = 32
# Most steps in one call where depths are given; see `Runner.run_trunk`.
MAX_STEPS_AHEAD = 16

__all__ = ["EngineConfig", "EngineCore", "EngineStats"]


class EngineCore:
    """One model serving many requests; all methods are called from one thread."""

    def __init__(self, model: Step3p5ForCausalLM, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        parameter = next(model.parameters())
        self.max_model_len = config.max_model_len or model.config.max_position_embeddings
        if self.max_model_len > model.config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len = {self.max_model_len} is more than the model's "
                f"{model.config.max_position_embeddings} positions"
            )
        self.num_modules = min(config.max_draft_depth, model.config.num_mtp_layers, MAX_MODULES)
        # Every running sequence must be able to verify its drafts in the same step.
        batched = max(config.max_num_batched_tokens, config.max_num_seqs * (1 + self.num_modules))
        limits = CacheLimits(
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            max_batched_tokens=batched,
            max_deferred_tokens=config.max_deferred_tokens,
            num_modules=self.num_modules,
            dtype=config.kv_dtype or model.model.embed_tokens.weight.dtype,
        )
        self.cache = KVCache(
            model.config, limits, kv_cache_bytes=config.kv_cache_bytes, device=parameter.device
        )
        self.prefix = PrefixCache(self.cache) if config.prefix_caching else None
        vocab_limit = min(config.vocab_limit or model.config.vocab_size, model.config.vocab_size)
        self.saver: Saver | None = None
        if self.prefix is not None and config.prefix_cache_path is not None:
            path, limit = Path(config.prefix_cache_path), config.prefix_cache_disk_bytes
            self.saver = Saver(path, self.cache, self.prefix, origin(model, self.cache), limit)
        self.sampler = Sampler(vocab_limit, parameter.device)
        self.runner = Runner(model, self.cache, self.sampler, config.max_deferred_tokens)
        self.scheduler = Scheduler(
            self.cache,
            self.prefix,
            max_num_batched_tokens=batched,
            before_preemption=self._remember,
        )
        self.depth = DepthController(self.num_modules)
        self.reading = Reading(
            self.cache, self.depth, config.max_deferred_tokens, is_shared=self.prefix is not None
        )
        eos = model.config.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
        self._eos_token_ids = frozenset(eos)
        self._sequences: dict[str, Sequence] = {}
        self._num_arrivals = 0
        self._last_depth = 0
        self._slots = config.max_num_seqs
        self._mean_seconds = 1.0  # of a request, from its start to its end
        self._counters = dict.fromkeys(("steps", "finished", "prompt", "computed_prompt", "generated"), 0)
        self._drafted = [0] * self.num_modules
        self._accepted = [0] * self.num_modules

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def is_decoding(self) -> bool:
        """Whether every request has read its prompt, so that the next step is a small one."""
        return not self.scheduler.waiting and all(seq.num_pending == 1 for seq in self.scheduler.running)

    def check(self, request: Request) -> None:
        """Refuse what can never run. Changes nothing, so any thread may call it.

        Raises:
            PromptTooLong: no room for a single token of output in the context.
            QueueFull: too many requests wait.
            RequestError: it can never fit into the KV cache (with the numbers), an id is outside the
                vocabulary, the prompt is empty, or the request id is taken.
        """
        prompt = request.prompt_token_ids
        vocab_size = self.runner.model.config.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if not all(0 <= i < vocab_size for i in (min(prompt), max(prompt))):
            raise RequestError(
                f"prompt token ids must be between 0 and {vocab_size - 1}, got {min(prompt)} to {max(prompt)}",
                param="prompt",
            )
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id!r} is already running", param="request_id")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong(len(prompt), self.max_model_len - 1)
        if len(prompt) >= self.cache.capacity_tokens:
            raise RequestError(
                f"the prompt of {len(prompt)} tokens can never fit: the KV cache of {self.cache.total_bytes} "
                f"bytes holds {self.cache.capacity_tokens} tokens of one sequence; "
                f"raise kv_cache_bytes by {self._bytes_short(len(prompt) + 1)}",
                code="context_length_exceeded",
            )
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            num_waiting = len(self.scheduler.waiting)
            raise QueueFull(
                f"{num_waiting} requests are waiting already", self._mean_seconds * num_waiting / self._slots
            )

    def lookup(self, request: Request) -> CacheLookup | None:
        """What the prefix cache has of a request's prompt now; None without one. Any thread may ask."""
        if self.prefix is None:
            return None
        found = self.prefix.peek(request.prompt_token_ids)
        return found if request.sampling.prompt_logprobs is None else replace(found, num_cached_tokens=0)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: and its kinds, see `check`.
        """
        self.check(request)
        prompt, sampling = request.prompt_token_ids, request.sampling
        room = self.cache.capacity_tokens - len(prompt)
        stop_ids = frozenset(sampling.stop_token_ids)
        seq = Sequence(
            request=request,
            sampler=self.sampler.state(sampling, prompt, self._seed(sampling.seed)),
            constraint=request.constraint,
            stop_ids=stop_ids if sampling.ignore_eos else stop_ids | self._eos_token_ids,
            max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            arrival=self._num_arrivals,
            submitted_at=time.perf_counter(),
            token_ids=list(prompt),
            stats=RequestStats(num_prompt_tokens=len(prompt)),
        )
        self.reading.begin(seq, self._counters["steps"])
        self._num_arrivals += 1
        self._counters["prompt"] += len(prompt)
        self._sequences[request.request_id] = seq
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> Output | None:
        """End a request now; its blocks are free when this returns. None if it is not running."""
        seq = self._sequences.get(request_id)
        return None if seq is None else self._finish(_ended(seq, "abort"))

    def close(self) -> None:
        """Save what is not saved yet of the prefix cache, if it has a path. The core stays usable.

        Raises:
            OSError: it cannot be written.
        """
        if self.saver is not None:
            self.saver.flush()

    def rebuilt(self) -> EngineCore:
        """A new core over the same model and settings. This one's cache is gone; it cannot be used any more."""
        self.cache.layers.clear()
        if self.saver is not None:
            self.saver.settle()
        return EngineCore(self.runner.model, self.config)

    def fail_all(self, error: BaseException) -> list[Output]:
        """End every request with an error; the engine itself is as new afterwards."""
        return [self._fail(seq, error) for seq in list(self._sequences.values())]

    def step(self) -> list[Output]:
        """Run one step and return what it brought. Empty when there is nothing to do."""
        with torch.inference_mode():
            return self._step(time.perf_counter())

    def _step(self, start: float) -> list[Output]:
        outputs = self._expire(start)
        plan = self.scheduler.schedule(start)
        if not plan:
            if self.scheduler.waiting and not self.scheduler.running and not outputs:
                # Cannot happen: `check` lets in only what fits when it is alone. Better an error than a hang.
                stuck = self.scheduler.waiting[0]
                outputs.append(self._fail(stuck, EngineError("the request does not fit into the KV cache")))
            return outputs
        self.reading.wake((item.seq for item in plan), self._counters["steps"])
        # A depth for all sequences that leave it to the engine, which run in the same batch; and for how many steps.
        following = [item.seq for item in plan if item.is_sampled and follows_engine(item.seq)]
        num_others = sum(item.is_sampled for item in plan) - len(following)
        depth = self.depth.choose([seq.acceptance for seq in following], num_others)
        max_steps = self.depth.num_steps if following else MAX_STEPS_AHEAD
        num_captured = self.runner.num_captured
        results, failures = self._run_trunk(plan, depth, max_steps)
        num_steps = 1 + max((len(result.earlier) for _, result in results), default=0)
        self._counters["steps"] += num_steps
        outputs += [self._fail(item.seq, error) for item, error in failures]
        committed: list[Output] = []
        jobs: list[DraftJob] = []
        for item, result in results:
            before = item.seq.num_computed
            try:
                output = self._commit(item, result)
                job = self._draft_job(
                    item.seq, result, before, depth, is_last=output.finish_reason is not None
                )
            except Exception as error:  # a constraint may raise anything; it is its request's own
                outputs.append(self._fail(item.seq, error))
                continue
            committed.append(output)
            jobs += [] if job is None else [job]
        drafted, broken = _isolated(self._run_modules, jobs)
        for job, _ in drafted:
            self._commit_drafts(job)
        now = time.perf_counter()
        for item, _ in results:
            item.seq.note_time(now)
        failed = {job.seq.request.request_id for job, _ in broken}
        for output in committed:
            if output.finish_reason is not None and output.request_id not in failed:
                outputs.append(self._finish(output))
            elif output.token_ids:
                is_broken = output.finish_reason is not None
                outputs.append(replace(output, finish_reason=None) if is_broken else output)
        outputs += [self._fail(job.seq, error) for job, error in broken]
        if self.runner.num_captured == num_captured:
            self._observe(plan, jobs, len(following), depth, num_steps, time.perf_counter() - start)
        if self.saver is not None:
            self.saver.turn()
        return outputs

    def stats(self) -> EngineStats:
        full, sliding = self.cache.pools
        per_full, per_sliding = self.cache.block_bytes
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_steps=self._counters["steps"],
            num_finished=self._counters["finished"],
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=self._counters["prompt"],
            num_computed_prompt_tokens=self._counters["computed_prompt"],
            num_cached_tokens=self.scheduler.num_cached_tokens,
            num_generated_tokens=self._counters["generated"],
            num_drafted_tokens=tuple(self._drafted),
            num_accepted_tokens=tuple(self._accepted),
            draft_depth=self._last_depth,
            kv_total_bytes=self.cache.total_bytes,
            kv_used_bytes=self.cache.used_bytes,
            kv_cached_bytes=full.num_cached * per_full + sliding.num_cached * per_sliding,
            kv_full_bytes=full.num_used * per_full,
            kv_full_total_bytes=full.num_blocks * per_full,
            kv_sliding_bytes=sliding.num_used * per_sliding,
            kv_sliding_total_bytes=sliding.num_blocks * per_sliding,
            kv_bytes_per_token=per_full // self.cache.block_size,
            kv_window_bytes=self.cache.window_bytes,
            num_cached_blocks=self.prefix.num_blocks if self.prefix else 0,
            num_snapshots=self.prefix.num_snapshots if self.prefix else 0,
        )

    def check_integrity(self) -> None:
        """Prove that every block is held by exactly those who say so.

        Raises:
            AssertionError: with the blocks at fault.
        """
        running = [seq.blocks for seq in self.scheduler.running if seq.blocks is not None]
        for group, pool in enumerate(self.cache.pools):
            held = [blocks.full if group == FULL else blocks.sliding for blocks in running]
            pool.check_integrity(held, self.prefix.keepers(group) if self.prefix else ())
        assert self.cache.num_free_rows + len(running) == self.config.max_num_seqs, (
            "rows of the tables leaked"
        )
        known = {id(seq) for seq in (*self.scheduler.running, *self.scheduler.waiting)}
        assert known == {id(seq) for seq in self._sequences.values()}, "requests were lost"

    def _bytes_short(self, num_tokens: int) -> int:
        blocks = -(-(num_tokens + LOOKAHEAD_SLOTS) // self.cache.block_size)
        per_full, per_sliding = self.cache.block_bytes
        short = (blocks - self.cache.pools[FULL].num_blocks) * per_full
        # A share of what is added goes to windows, in whole blocks.
        return int((short + per_sliding) / (1 - SNAPSHOT_SHARE)) + 1

    def _seed(self, seed: int | None) -> int:
        """The noise seed of a request: its own, the next of the engine's, or a random one."""
        if seed is not None:
            return seed
        if self.config.seed is not None:
            return (self.config.seed << 32) + self._num_arrivals
        return int.from_bytes(os.urandom(8), "little")

    def _expire(self, now: float) -> list[Output]:
        late = [
            seq
            for seq in self._sequences.values()
            if seq.request.deadline_seconds is not None
            and now - seq.submitted_at > seq.request.deadline_seconds
        ]
        return [self._finish(_ended(seq, "abort", stop_reason="deadline")) for seq in late]

    def _run_trunk(
        self, plan: Seq[Scheduled], depth: int, max_steps: int
    ) -> tuple[list[tuple[Scheduled, TrunkResult]], list[tuple[Scheduled, Exception]]]:
        """Results and failures. A guess that cannot be computed is no failure of who has not said it."""

        def run(items: Seq[Scheduled]) -> list[TrunkResult]:
            # With a prefix cache the states at each block's end are wanted.
            return self.runner.run_trunk(items, depth, max_steps, single_blocks=self.prefix is not None)

        results, failures = _isolated(run, plan)
        guesses = [replace(item, drafts=()) for item, _ in failures if item.drafts]
        if guesses:
            more, still = _isolated(run, guesses)
            results += more
            failures = [(item, error) for item, error in failures if not item.drafts] + still
        return results, failures

    def _commit(self, item: Scheduled, result: TrunkResult) -> Output:
        """Take over what the trunk said: tokens, progress, statistics."""
        seq, stats = item.seq, item.seq.stats
        is_first = bool(result.token_ids) and not seq.num_generated
        prefilled = max(0, min(item.num_tokens, seq.num_prompt_tokens - seq.num_computed))
        stats.num_prefill_tokens += prefilled
        self._counters["computed_prompt"] += prefilled
        seq.prompt_logprobs += result.prompt_logprobs
        if result.earlier:
            self._commit_earlier(item, result)
        before = seq.num_computed
        stats.num_steps += 1
        token_ids = self._until_stop(seq, result.token_ids)
        if seq.constraint is not None:
            for token_id in token_ids:
                if token_id not in seq.stop_ids:
                    seq.constraint.accept(token_id)
        if result.num_drafts:
            self._count_drafts(seq, result.num_drafts, result.num_accepted)
        seq.sampler.accept(token_ids)
        seq.token_ids += token_ids
        seq.num_computed = min(before + item.num_tokens + result.num_accepted, len(seq.token_ids))
        stats.num_generated_tokens = seq.num_generated
        self._counters["generated"] += len(token_ids)
        reason: FinishReason | None = None
        stop_reason = None
        if token_ids and token_ids[-1] in seq.stop_ids:
            reason = "stop"
            stop_reason = token_ids[-1] if token_ids[-1] in seq.sampling.stop_token_ids else None
        elif result.token_ids and seq.num_generated >= seq.max_tokens:
            reason = "length"
        return Output(
            request_id=seq.request.request_id,
            token_ids=(*chain.from_iterable(result.earlier), *token_ids),
            logprobs=tuple(result.logprobs[: len(token_ids)]),
            prompt_logprobs=tuple(seq.prompt_logprobs) if is_first else (),
            finish_reason=reason,
            stop_reason=stop_reason,
            stats=stats,
        )

    def _commit_earlier(self, item: Scheduled, result: TrunkResult) -> None:
        """Take over the steps before the last of one call. None ends the sequence, and no constraint watches."""
        seq, num_drafts = item.seq, len(item.drafts)
        for token_ids in result.earlier:
            if num_drafts:
                self._count_drafts(seq, num_drafts, len(token_ids) - 1)
            num_drafts = result.num_drafts
            seq.token_ids += token_ids
            seq.num_computed += len(token_ids)
            self._counters["generated"] += len(token_ids)
        seq.stats.num_steps += len(result.earlier)
        seq.mtp.num_computed = [len(seq.token_ids)] * seq.num_modules
        seq.mtp.pending[1:] = result.pending

    def _draft_job(
        self, seq: Sequence, result: TrunkResult, before: int, depth: int, is_last: bool
    ) -> DraftJob | None:
        """What is left to do for the modules; None for a finished sequence that leaves no new snapshot."""
        snapshots, now = self._snapshots(seq, before), self._counters["steps"]
        if is_last:
            self.reading.judge(seq, now, is_last=True)
            # Whoever continues this answer starts at its last block, so the modules must be up to date there.
            boundary = seq.num_computed - seq.num_computed % self.config.block_size
            is_newer = boundary > (seq.boundary[0] if seq.boundary else 0)
            if self.prefix is None or not (is_newer or snapshots):
                return None
        seq.drafts, seq.drafts_are_forced = [], False
        wanted = 0
        if result.token_ids and not is_last:
            room = seq.max_tokens - seq.num_generated - 1
            forced = seq.constraint.forced() if seq.constraint is not None else ()
            if forced:
                # The mask leaves the trunk no other choice, so these are certain and need no module.
                seq.drafts, seq.drafts_are_forced = list(forced[: min(room, MAX_FORCED_TOKENS)]), True
            else:
                wanted = min(wanted_depth(seq, depth), room)
            if not wanted:
                self.reading.judge(seq, now, is_last=False)
        return DraftJob(
            seq,
            result.hidden_states,
            wanted,
            must_advance=is_last or bool(snapshots) or not result.token_ids,
            snapshots=snapshots,
            ahead=result.ahead,
        )

    def _snapshots(self, seq: Sequence, before: int) -> frozenset[int] | None:
        """Block boundaries in the slots just computed where a snapshot is worth its windows; None without a cache."""
        if self.prefix is None:
            return None
        size, interval = self.config.block_size, self.config.snapshot_interval
        wanted = list(range((before // interval + 1) * interval, seq.num_computed + 1, interval))
        if before < seq.num_prompt_tokens - 1:
            # The end of the prompt leaves one token to compute, for a request with the same prompt.
            wanted += [*seq.request.cut_points, seq.num_prompt_tokens - 1]
        return frozenset(p for p in (cut - cut % size for cut in wanted) if before < p <= seq.num_computed)

    def _run_modules(self, jobs: Seq[DraftJob]) -> Seq[DraftJob]:
        self.runner.run_modules(jobs)
        return jobs

    def _commit_drafts(self, job: DraftJob) -> None:
        """Take over drafts and MTP state, keep snapshots, and let go of blocks behind the window."""
        seq, cache = job.seq, self.cache
        assert seq.blocks is not None
        if not seq.drafts_are_forced:
            seq.drafts = job.drafts
        seq.mtp = job.mtp
        boundary = seq.num_computed - seq.num_computed % cache.block_size
        if boundary in job.carries:
            seq.boundary = boundary, job.carries[boundary]
        for boundary in sorted(job.carries.keys() & (job.snapshots or ())):
            self._snapshot(seq, boundary, job.carries[boundary])
        cache.trim(seq.blocks, min([seq.num_computed, *seq.mtp.num_computed]))

    def _snapshot(self, seq: Sequence, boundary: int, carries: tuple[torch.Tensor, ...]) -> None:
        assert self.prefix is not None
        assert seq.blocks is not None
        sliding = self.cache.sliding_before(seq.blocks, boundary)
        if boundary and sliding is not None:
            self.reading.forget(seq, boundary)
            full = seq.blocks.full[: boundary // self.cache.block_size]
            node = self.prefix.insert(seq.token_ids, full)
            self.prefix.add_snapshot(node, *sliding, carries)

    def _remember(self, seq: Sequence) -> None:
        """Keep what a sequence that loses its blocks has computed, for whoever continues it."""
        if self.prefix is not None and seq.boundary is not None and seq.blocks is not None:
            self._snapshot(seq, *seq.boundary)

    def _count_drafts(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        if seq.drafts_are_forced:
            seq.stats.num_forced_tokens += num_accepted
            return
        for counts, number in (
            (seq.stats.num_drafted_tokens, num_drafts),
            (self._drafted, num_drafts),
            (seq.stats.num_accepted_tokens, num_accepted),
            (self._accepted, num_accepted),
        ):
            for k in range(number):
                counts[k] += 1
        self.depth.accept(seq.acceptance, num_drafts, num_accepted)

    def _until_stop(self, seq: Sequence, token_ids: list[int]) -> list[int]:
        room = seq.max_tokens - seq.num_generated
        for i, token_id in enumerate(token_ids[:room]):
            if token_id in seq.stop_ids:
                return token_ids[: i + 1]
        return token_ids[:room]

    def _finish(self, output: Output) -> Output:
        """Free everything that a request holds; its last output."""
        seq = self._sequences.pop(output.request_id)
        if output.finish_reason != "error":
            self._remember(seq)
        self.scheduler.remove(seq)
        seq.mtp = MtpState()
        self._counters["finished"] += 1
        if seq.started_at is not None:
            self._mean_seconds += 0.1 * (time.perf_counter() - seq.started_at - self._mean_seconds)
        return output

    def _fail(self, seq: Sequence, error: BaseException) -> Output:
        fault = error if isinstance(error, RequestError) else None
        if fault is None:
            logger.error("request %s failed", seq.request.request_id, exc_info=error)
        message = str(error) if isinstance(error, StepflashError) else f"{type(error).__name__}: {error}"
        return replace(self._finish(_ended(seq, "error")), error=message, request_error=fault)

    def _observe(
        self,
        plan: Seq[Scheduled],
        jobs: Seq[DraftJob],
        num_following: int,
        depth: int,
        num_steps: int,
        seconds: float,
    ) -> None:
        """Time steps for the depth controller when they were nothing but decoding, all followers at one depth."""
        if len(jobs) < len(plan):
            return
        if all(item.seq.sampling.draft_depth is None for item in plan):
            self._last_depth = depth
        num_even = 0
        for item, job in zip(plan, jobs, strict=True):
            if item.num_tokens > 1 or len(item.drafts) != job.depth:
                return
            num_even += job.depth == depth and follows_engine(item.seq)
        if num_even == num_following > 0:
            self.depth.observe(num_following, depth, seconds, num_steps, len(plan) - num_following)


def _ended(seq: Sequence, reason: FinishReason, stop_reason: str | None = None) -> Output:
    return Output(
        request_id=seq.request.request_id, finish_reason=reason, stop_reason=stop_reason, stats=seq.stats
    )


def _isolated(
    run: Callable[[Seq[T]], Seq[R]], items: Seq[T]
) -> tuple[list[tuple[T, R]], list[tuple[T, Exception]]]:
    """Run all items together; if that fails, each alone. Results and failures with their items."""
    if not items:
        return [], []
    try:
        return list(zip(items, run(items), strict=True)), []
    except Exception as error:  # anything may come out of kernels and constraints; see the module docstring
        if len(items) == 1:
            return [], [(items[0], error)]
    results: list[tuple[T, R]] = []
    failures: list[tuple[T, Exception]] = []
    for item in items:
        done, failed = _isolated(run, [item])
        results += done
        failures += failed
    return results, failures
