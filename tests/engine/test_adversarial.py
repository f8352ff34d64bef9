"""Requests of every kind at once, in hardly any memory, some of them hostile: each good one gets what it gets alone.

Packed micro, so that whole passes and drafts are native calls. Hypothesis draws priorities, deadlines, aborts in
every phase, grammars that dictate or break, stop tokens, all depths, kinds of sampling, keys and values in bf16 or
int8, and a prefix cache that is saved, evicted and restarted meanwhile. One token's embedding is not a number: to
say or to be given it is an error, to have it guessed is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine import saver
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.kv_cache import FULL, SLIDING
from stepflash.engine.request import Request, SamplingParams
from stepflash.engine.scheduler import Scheduled
from stepflash.errors import ConfigError
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import load_model
from stepflash.weights.quantized import quantize_model
from tests.engine.conftest import MICRO, Finished, collect, drive

POISON = 499  # its embedding is not a number
MAX_MODEL_LEN = 96
EOS = (1, 2)


@pytest.fixture(scope="module")
def packed() -> Step3p5ForCausalLM:
    model = quantize_model(load_model(MICRO, progress=False), "bf16")
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
    return model


class Grammar:
    """Says one of a few tokens, then two that are certain, in turns; raises or finds nothing after `fuse` tokens."""

    def __init__(self, fuse: int, how: str) -> None:
        self.said: list[int] = []
        self.fuse, self.how = fuse, how

    def mask(self) -> Sequence[int]:
        if len(self.said) >= self.fuse:
            if self.how == "raise":
                raise ValueError("broken")
            if self.how == "nothing":
                return []
            if self.how == "end":
                return EOS
        return ([7, 31, 55, 102], [8], [9])[len(self.said) % 3]

    def accept(self, token_id: int) -> None:
        self.said.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens <= len(self.said)
        del self.said[len(self.said) - num_tokens :]

    def forced(self) -> Sequence[int]:
        if len(self.said) >= self.fuse:
            return ()
        return ((), (8, 9), (9,))[len(self.said) % 3]


sampling = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([None, 1, 2, 3, 5, 8, 20, 2**70]),
    temperature=st.sampled_from([0.0, 0.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5, 2**40]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    # Among few tokens drafts are right often enough.
    logit_bias=st.sampled_from([{}, {7: 100.0, 31: 100.0, 55: 100.0, 102: 100.0}]),
    seed=st.integers(-5, 2**64),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (7,), (31, 8)]),
    logprobs=st.sampled_from([None, None, 0, 2]),
    draft_depth=st.sampled_from([None, 0, 1, 2, 3, 3]),
)


@dataclass
class Job:
    """A request: which prompt, how long, when it comes, when it is taken back (in steps since), and what ails it."""

    sampling: SamplingParams
    family: int
    length: int
    start: int
    abort_after: int | None
    priority: int
    deadline: int | None
    grammar: tuple[int, str] | None
    is_poisoned: bool

    def request(self, name: str) -> Request:
        prompt = [(self.family * 7 + i * i) % 90 + 3 for i in range(self.length)]
        if self.is_poisoned:
            prompt[-1] = POISON
        return Request(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling=self.sampling,
            cut_points=(self.length // 2,),
            priority=self.priority,
            deadline_seconds=self.deadline,
            constraint=None if self.grammar is None else Grammar(*self.grammar),
        )


jobs = st.builds(
    Job,
    sampling=sampling,
    family=st.integers(0, 2),
    length=st.one_of(st.integers(1, 60), st.sampled_from([MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 2, 1])),
    start=st.integers(0, 15),
    abort_after=st.sampled_from([None, None, None, None, 0, 1, 2, 5, 12]),
    priority=st.integers(-1, 1),
    deadline=st.sampled_from([None, None, None, 0, 3, 10]),
    grammar=st.one_of(
        st.none(),
        st.none(),
        st.tuples(st.integers(0, 9), st.sampled_from(["raise", "nothing", "end", "never"])),
    ),
    is_poisoned=st.sampled_from([False] * 7 + [True]),
)


@settings(max_examples=40)
@given(
    work=st.lists(jobs, min_size=2, max_size=9),
    budget=st.integers(1, 60),
    max_num_seqs=st.integers(1, 5),
    block_size=st.sampled_from([4, 8, 16]),
    spare_blocks=st.sampled_from([0, 2, 60]),
    max_deferred=st.sampled_from([1, 6, 64]),
    kv_dtype=st.sampled_from([torch.bfloat16, torch.int8]),
    caching=st.sampled_from(["no", "memory", "disk"]),
    restart_at=st.integers(0, 40),
)
def test_each_good_request_gets_what_it_gets_alone(
    packed: Step3p5ForCausalLM,
    tmp_path_factory: pytest.TempPathFactory,
    work: list[Job],
    budget: int,
    max_num_seqs: int,
    block_size: int,
    spare_blocks: int,
    max_deferred: int,
    kv_dtype: torch.dtype,
    caching: str,
    restart_at: int,
) -> None:
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        max_deferred_tokens=max_deferred,
        snapshot_interval=2 * block_size,
        kv_dtype=kv_dtype,
        prefix_caching=caching != "no",
        prefix_cache_path=tmp_path_factory.mktemp("cache") / "file" if caching == "disk" else None,
        eos_token_ids=EOS,
    )
    config = replace(config, kv_cache_bytes=enough_for_one(packed, config, spare_blocks))
    finished: dict[str, Finished] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "COPY_SHARE", 1e9)
        patch.setattr(saver, "SAVE_SECONDS", 0.0)
        clock = [1000.0]
        core = EngineCore(packed, config)
        # A step a second, and a little of the true time, which depths are chosen by.
        true = time.perf_counter
        patch.setattr("stepflash.engine.core.time.perf_counter", lambda: clock[0] + 1e-6 * (true() % 1000))
        for step in range(4000):
            for number, job in enumerate(work):
                name = f"r{number}"
                if job.start == step:
                    core.add(job.request(name))
                if job.abort_after is not None and job.start + job.abort_after == step:
                    output = core.abort(name)
                    collect(finished, [output] if output else [])
            collect(finished, core.step())
            clock[0] += 1.0
            core.check_integrity()
            check_accounting(core)
            if step > 27 and not core.has_work:
                break
            if step == restart_at and caching == "disk" and not core.has_work:
                core = restarted(packed, config, core)
    assert sorted(finished) == sorted(f"r{i}" for i in range(len(work)))
    assert core.stats().kv_used_bytes == core.stats().kv_cached_bytes
    assert core.cache.num_free_rows == max_num_seqs
    if core.prefix is not None:
        core.prefix.clear()
    assert core.cache.used_bytes == 0
    if core.saver is not None:
        core.saver.settle()
    for number, job in enumerate(work):
        check(packed, config, job, finished[f"r{number}"])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_guess_that_is_not_a_number_harms_nobody(
    packed: Step3p5ForCausalLM, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its values are not numbers either, and rows before it, which do not look at it, multiply them by zero."""
    found, guesses = [], list[Scheduled]()
    for draft_depth in (0, depth):
        core = EngineCore(
            packed, EngineConfig(max_model_len=MAX_MODEL_LEN, max_num_seqs=2, eos_token_ids=EOS)
        )
        run = core.runner.run_trunk

        def watched(
            plan: Sequence[Scheduled], *rest: object, run: Callable[..., object] = run, **more: object
        ) -> object:
            guesses.extend(plan)
            return run(plan, *rest, **more)

        monkeypatch.setattr(core.runner, "run_trunk", watched)
        requests = [
            Request(
                request_id=name,
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=20, temperature=0.0, draft_depth=draft_depth),
            )
            for name, prompt in (("guesses", (10, 11, 14, 19, 26, 35, 46)), ("other", (5, 6, 7)))
        ]
        found.append({name: one.token_ids for name, one in drive(core, *requests).items()})
    assert any(POISON in item.drafts for item in guesses)
    assert len(found[0]["guesses"]) == 20
    assert found[0] == found[1]


def check(model: Step3p5ForCausalLM, config: EngineConfig, job: Job, found: Finished) -> None:
    """Against the same request alone, without drafts, without a prefix cache, with plenty of memory."""
    plain = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=1,
        kv_dtype=config.kv_dtype,
        prefix_caching=False,
        max_draft_depth=0,
        eos_token_ids=EOS,
    )
    alone = replace(job, deadline=None, sampling=replace(job.sampling, draft_depth=0)).request("alone")
    expected = drive(EngineCore(model, plain), alone)["alone"]
    reason = found.last.finish_reason
    assert found.token_ids == expected.token_ids[: len(found.token_ids)]
    if reason == "abort":
        assert job.abort_after is not None or job.deadline is not None
        assert (found.last.stop_reason == "deadline") <= (job.deadline is not None)
    else:
        assert (reason, found.last.stop_reason, found.last.error) == (
            expected.last.finish_reason, expected.last.stop_reason, expected.last.error,
        )  # fmt: skip
        assert found.token_ids == expected.token_ids
    logprobs = [[entry for output in one.outputs for entry in output.logprobs] for one in (found, expected)]
    assert len(logprobs[0]) == (len(found.token_ids) if job.sampling.logprobs is not None else 0)
    assert logprobs[0] == logprobs[1][: len(logprobs[0])]
    stats = found.last.stats
    assert stats is not None
    assert stats.num_generated_tokens == len(found.token_ids)
    assert all(a <= d for a, d in zip(stats.num_accepted_tokens, stats.num_drafted_tokens, strict=True))


def restarted(model: Step3p5ForCausalLM, config: EngineConfig, core: EngineCore) -> EngineCore:
    """As after SIGKILL: what is on disk is all there is."""
    assert core.saver is not None
    core.saver.settle()
    new = EngineCore(model, config)
    new.check_integrity()
    return new


def check_accounting(core: EngineCore) -> None:
    """The reported bytes are those of the rows that sequences and prefix cache say to have."""
    stats, used, cached = core.stats(), [], 0
    running = [seq.blocks for seq in core.scheduler.running if seq.blocks is not None]
    for group in (FULL, SLIDING):
        held = {i for b in running for i in (b.full if group == FULL else b.sliding)}
        kept = {i for ids in core.prefix.keepers(group) for i in ids} if core.prefix else set()
        rows = [
            tensor[0].nbytes
            for layer in core.cache.layers.values()
            for tensor in (layer.keys, layer.values, layer.k_scale, layer.v_scale)
            if layer.group == group and tensor is not None
        ]
        used.append(len(held | kept) * sum(rows))
        cached += len(kept - held) * sum(rows)
    assert [stats.kv_full_bytes, stats.kv_sliding_bytes] == used
    assert stats.kv_cached_bytes == cached


def enough_for_one(model: Step3p5ForCausalLM, config: EngineConfig, spare_blocks: int) -> int:
    """The least cache that holds one sequence of full length, and `spare_blocks` more."""
    blocks = -(-(MAX_MODEL_LEN + 7) // config.block_size) + spare_blocks
    low, high = 1, 1 << 28
    while low < high:
        middle = (low + high) // 2
        try:
            core = EngineCore(model, replace(config, kv_cache_bytes=middle, prefix_cache_path=None))
            is_enough = core.cache.pools[FULL].num_blocks >= blocks
        except ConfigError:
            is_enough = False
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return low
