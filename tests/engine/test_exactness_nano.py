"""Property 2 on nano: one output, however it is computed; drafts are right there most of the time.

Every way of sampling is run plainly, alone and without drafts; then with every depth, in batches with small token
budgets, after prefix hits, from a cache on disk and with so little memory that requests are preempted. Token ids,
text, logprobs, finish reasons must be the same each time. Weights: those shipped, in the native kernels'
formats where there are any (they compute a token alike whatever is beside it), in float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.constraints import Constraint
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.llm import LLM, RequestOutput
from stepflash.engine.request import Request, SamplingParams
from stepflash.errors import ConfigError
from stepflash.kernels import build
from stepflash.nano.tasks import held_out, prompt_text
from tests.engine.conftest import Finished, collect, drive

MAX_TOKENS = 48
SIZES: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 128, "max_model_len": 1024}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano", dtype="bfloat16" if build.load() else "float32", prefix_caching=False, **SIZES)


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    assert llm.tokenizer is not None
    texts = [prompt_text(held_out(task, 1, "easy")[0]) for task in ("add", "sort", "word_problem", "weekday")]
    return [llm.tokenizer.encode(text) for text in texts]


KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, logprobs=4),
    "sampled": SamplingParams(temperature=1.0, seed=11),
    "top-k": SamplingParams(temperature=0.8, top_k=20, seed=12),
    "top-p, min-p": SamplingParams(temperature=1.2, top_p=0.9, min_p=0.02, seed=13, logprobs=0),
    "penalties": SamplingParams(
        temperature=0.7, presence_penalty=0.6, frequency_penalty=0.3, repetition_penalty=1.1, seed=14
    ),
    "greedy with penalties": SamplingParams(temperature=0.0, frequency_penalty=0.4, repetition_penalty=1.2),
    "bias": SamplingParams(temperature=0.9, logit_bias={40: 4.0, 41: 3.0, 500: -100.0}, seed=15),
    "all": SamplingParams(
        temperature=1.1,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        presence_penalty=0.2,
        logit_bias={60: 1.0},
        seed=2**70,
        logprobs=2,
        ignore_eos=True,
    ),
}
KINDS = {name: replace(sampling, max_tokens=MAX_TOKENS) for name, sampling in KINDS.items()}


def told(output: RequestOutput) -> tuple[Any, ...]:
    """All that a caller sees but the statistics."""
    logprobs = None
    if output.logprobs is not None:
        logprobs = [(e.token_id, round(e.logprob, 3), tuple(i for i, _ in e.top)) for e in output.logprobs]
    return output.token_ids, output.text, output.finish_reason, output.stop_reason, logprobs


def plain(llm: LLM, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[RequestOutput]:
    return [llm.generate([prompt], replace(sampling, draft_depth=0))[0] for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_every_depth_and_batch_gives_the_plain_output(llm: LLM, prompts: list[list[int]], kind: str) -> None:
    alone = plain(llm, prompts, KINDS[kind])
    assert len({tuple(output.token_ids) for output in alone}) == len(prompts)
    accepted = 0
    for depth in (1, 2, 3, None):
        sampling = replace(KINDS[kind], draft_depth=depth)
        (single,) = llm.generate([prompts[0]], sampling)
        assert told(single) == told(alone[0]), depth
        accepted += sum(single.stats.num_accepted_tokens)
        together = llm.generate(prompts, sampling)
        assert list(map(told, together)) == list(map(told, alone)), depth
    assert accepted > 5
    # All depths and kinds in one batch, twelve requests on six places.
    kinds = list(KINDS.values())
    others = [replace(kinds[i % len(kinds)], draft_depth=(0, 1, 2, 3, None)[i % 5]) for i in range(8)]
    mixed = llm.generate([*prompts, *prompts, *prompts], [*others, *[KINDS[kind]] * 4])
    assert list(map(told, mixed[8:])) == list(map(told, alone))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_strings_cut_at_the_same_place(llm: LLM, prompts: list[list[int]], temperature: float) -> None:
    free = SamplingParams(temperature=temperature, seed=5, max_tokens=MAX_TOKENS, ignore_eos=True)
    (output,) = plain(llm, prompts[1:2], free)
    cuts = 0
    for start in range(6, len(output.text) - 3, 9):
        stopping = replace(free, stop=(output.text[start : start + 3], "never said"))
        (expected,) = plain(llm, prompts[1:2], stopping)
        assert expected.finish_reason == "stop"
        assert expected.text == output.text[: output.text.index(stopping.stop[0])]
        for depth in (1, 3, None):
            (found,) = llm.generate([prompts[1]], replace(stopping, draft_depth=depth))
            assert told(found) == told(expected)
            cuts += 1
    assert cuts >= 9


def test_stop_tokens_cut_in_the_middle_of_accepted_drafts(llm: LLM, prompts: list[list[int]]) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    (output,) = plain(llm, prompts[1:2], free)
    for stop in sorted(set(output.token_ids))[:8]:
        for depth in (0, 1, 3):
            sampling = replace(free, stop_token_ids=(stop,), draft_depth=depth)
            (found,) = llm.generate([prompts[1]], sampling)
            assert found.token_ids == output.token_ids[: output.token_ids.index(stop) + 1]
            assert (found.finish_reason, found.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 7])
def test_an_answer_has_exactly_the_tokens_asked_for(
    llm: LLM, prompts: list[list[int]], max_tokens: int
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    (expected,) = plain(llm, prompts[:1], sampling)
    (found,) = llm.generate([prompts[0]], replace(sampling, draft_depth=3))
    assert len(found.token_ids) == max_tokens
    assert told(found) == told(expected)


# Anything at once

params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 1.0, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {33: 5.0, 44: 5.0}]),
    seed=st.integers(-5, 2**64),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 3]),
    draft_depth=st.sampled_from([None, 1, 2, 3]),
)
work = st.tuples(params, st.integers(0, 3), st.integers(1, 200), st.integers(0, 12), st.booleans())


@settings(max_examples=20)
@given(
    jobs=st.lists(work, min_size=1, max_size=8),
    budget=st.integers(1, 90),
    max_num_seqs=st.integers(1, 5),
    block_size=st.sampled_from([4, 16, 32]),
    scarce=st.booleans(),
    max_deferred=st.sampled_from([1, 8, 64]),
)
def test_any_requests_at_any_time_get_what_each_gets_alone(
    llm: LLM,
    prompts: list[list[int]],
    jobs: list[tuple[SamplingParams, int, int, int, bool]],
    budget: int,
    max_num_seqs: int,
    block_size: int,
    scarce: bool,
    max_deferred: int,
) -> None:
    """Prompts that share beginnings, come at different steps and are aborted, in a cache that may be tiny."""
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=256,
        block_size=block_size,
        max_deferred_tokens=max_deferred,
        snapshot_interval=2 * block_size,
        kv_cache_bytes=None if not scarce else 1,
        vocab_limit=llm.core.config.vocab_limit,
        eos_token_ids=llm.core.config.eos_token_ids,
    )
    if scarce:
        config = replace(config, kv_cache_bytes=bytes_for_one(llm, config))
    core = EngineCore(llm.model, config)
    finished: dict[str, Finished] = {}
    asked = []
    for number, (sampling, kind, length, start, aborted) in enumerate(jobs):
        prompt = (prompts[kind] * 8)[:length]
        asked.append((start, f"r{number}", Request(
            request_id=f"r{number}", prompt_token_ids=tuple(prompt), sampling=sampling
        ), aborted))  # fmt: skip
    for step in range(5000):
        for start, name, job, aborted in asked:
            if start == step:
                core.add(job)
            if aborted and start + 9 == step and (output := core.abort(name)) is not None:
                collect(finished, [output])
        collect(finished, core.step())
        core.check_integrity()
        if step > 30 and not core.has_work:
            break
    assert sorted(finished) == sorted(name for _, name, _, _ in asked)
    for _, name, job, _ in asked:
        (alone,) = plain(llm, [list(job.prompt_token_ids)], job.sampling)
        found = finished[name]
        assert found.last.finish_reason in (alone.finish_reason, "abort"), found.last.error
        assert found.token_ids == alone.token_ids[: len(found.token_ids)]
        if found.last.finish_reason != "abort":
            assert found.token_ids == alone.token_ids
        if alone.logprobs is not None:
            logprobs = [entry for output in found.outputs for entry in output.logprobs]
            for one, other in zip(logprobs, alone.logprobs, strict=False):
                assert one.token_id == other.token_id
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def bytes_for_one(llm: LLM, config: EngineConfig) -> int:
    """The least cache that this configuration takes in which one sequence of full length fits."""
    blocks = -(-(config.max_model_len or 0) // config.block_size) + 2
    low, high = 1, 1 << 30
    while low < high:
        middle = (low + high) // 2
        try:
            core = EngineCore(llm.model, replace(config, kv_cache_bytes=middle))
            is_enough = core.cache.pools[0].num_blocks >= blocks
        except ConfigError:
            is_enough = False
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return low


# Grammars


class Calls:
    """`[digits,digits,...]` and then the end: letters of the grammar are single tokens; "," after three digits."""

    def __init__(self, llm: LLM) -> None:
        assert llm.tokenizer is not None
        encode = llm.tokenizer.encode
        self.digits = [encode(str(d))[-1] for d in range(10)]
        (self.open,), (self.comma,), (self.close,) = encode("["), encode(","), encode("]")
        self.end = sorted(llm.tokenizer.eos_token_ids)
        self.said: list[int] = []

    def mask(self) -> list[int]:
        if not self.said:
            return [self.open]
        if self.said[-1] == self.close:
            return self.end
        run = 0
        for token in reversed(self.said):
            if token not in self.digits:
                break
            run += 1
        if run == 0:
            return self.digits
        ends = [self.comma] if self.said.count(self.comma) < 5 else [self.close]
        return ends if run == 3 else [*self.digits, *ends]

    def accept(self, token_id: int) -> None:
        assert token_id in self.mask()
        self.said.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens <= len(self.said)
        del self.said[len(self.said) - num_tokens :]

    def forced(self) -> list[int]:
        allowed = self.mask()
        return allowed if len(allowed) == 1 and allowed != self.end else []


def run(
    llm: LLM, prompts: Sequence[list[int]], sampling: SamplingParams, **options: Any
) -> dict[str, Finished]:
    """Each prompt under the grammar, together in a core of their own."""
    core = EngineCore(llm.model, replace(llm.core.config, **options))
    constraints: list[Constraint] = [Calls(llm) for _ in prompts]
    asked = [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            constraint=constraint,
        )
        for i, (prompt, constraint) in enumerate(zip(prompts, constraints, strict=True))
    ]
    return drive(core, *asked)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalties", "all"])
def test_a_grammar_gives_the_same_answer_at_every_depth(
    llm: LLM, prompts: list[list[int]], kind: str
) -> None:
    sampling = replace(KINDS[kind], ignore_eos=False)
    tokens = {}
    for depth in (0, 1, 2, 3, None):
        done = run(llm, prompts, replace(sampling, draft_depth=depth))
        tokens[depth] = {name: entry.token_ids for name, entry in done.items()}
        assert all(entry.last.finish_reason == "stop" for entry in done.values())
        assert all(sum(entry.stats.num_drafted_tokens) > 0 for entry in done.values()) or not depth
    assert all(other == tokens[0] for other in tokens.values())
    assert llm.tokenizer is not None
    for token_ids in tokens[0].values():
        inner = llm.tokenizer.decode(token_ids[:-1]).strip()
        assert inner[0] + inner[-1] == "[]"
        assert all(1 <= len(part) <= 3 and part.isdigit() for part in inner[1:-1].split(","))


# Caches and memory


@pytest.mark.parametrize("kind", ["greedy", "sampled", "all"])
def test_a_prefix_hit_and_a_restart_change_nothing(
    llm: LLM, prompts: list[list[int]], kind: str, tmp_path: Path
) -> None:
    sampling = replace(KINDS[kind], draft_depth=3)
    config = replace(
        llm.core.config,
        prefix_caching=True,
        prefix_cache_path=tmp_path / "cache",
        kv_cache_bytes=96 << 20,
    )
    core = EngineCore(llm.model, config)

    def ask(name: str, prompt: list[int]) -> Finished:
        asked = Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)
        return drive(core, asked)[name]

    history: list[int] = []
    for turn, prompt in enumerate(prompts * 2):
        history += prompt
        (expected,) = plain(llm, [history], sampling)
        cold = ask(f"cold-{turn}", history)
        warm = ask(f"warm-{turn}", history)
        assert cold.token_ids == warm.token_ids == expected.token_ids
        assert warm.stats.num_cached_tokens >= len(history) - 1 - 16
        if turn:
            assert cold.stats.num_cached_tokens > 0
        history += cold.token_ids
        if turn == 4:
            core.close()
            core = EngineCore(llm.model, config)


@pytest.mark.parametrize("caching", [False, True])
def test_preemption_changes_nothing(llm: LLM, prompts: list[list[int]], caching: bool) -> None:
    sampling = replace(KINDS["all"], max_tokens=120)
    long = [prompt * 3 for prompt in prompts]
    alone = plain(llm, long, sampling)
    small = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=512,
        prefix_caching=caching,
        kv_cache_bytes=smallest_cache(llm, 0.6),
        vocab_limit=llm.core.config.vocab_limit,
        eos_token_ids=llm.core.config.eos_token_ids,
    )
    core = EngineCore(llm.model, small)
    asked = [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=tuple(prompt),
            sampling=replace(sampling, draft_depth=depth),
        )
        for i, (prompt, depth) in enumerate(zip(long, (3, 0, None, 2), strict=True))
    ]
    done = drive(core, *asked)
    assert core.stats().num_preemptions > 0
    assert [done[f"r{i}"].token_ids for i in range(4)] == [output.token_ids for output in alone]


def smallest_cache(llm: LLM, share: float) -> int:
    """Bytes for the windows of four sequences, and full blocks for `share` of what they need."""
    from stepflash.engine.kv_cache import FULL, SLIDING, CacheLimits, block_bytes, sliding_blocks_per_sequence

    limits = CacheLimits(
        max_num_seqs=4,
        max_model_len=512,
        max_batched_tokens=64,
        max_deferred_tokens=64,
        num_modules=3,
        dtype=llm.core.cache.limits.dtype,
    )
    config = llm.model.config
    per_block = block_bytes(config, limits)
    windows = 4 * sliding_blocks_per_sequence(config, limits) + 64 // 16 + 4
    return windows * per_block[SLIDING] + int(share * 4 * 16 * per_block[FULL] / 0.75)
