"""Captured passes against the model's own modules, on the CPU: a tape of tensor operations stands in for CUDA graphs.

Like a graph, a tape repeats the operations that were recorded, on the same buffers, whatever Python would do now; and
it refuses what a graph cannot have, numbers taken from the device or brought from the host.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine import cuda_replay
from stepflash.engine.batch import Span
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.cuda_graphs import GraphNetwork
from stepflash.engine.network import ModelNetwork, Pass
from stepflash.engine.request import Request, SamplingParams
from stepflash.kernels import build, ops, reference
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.nano.tasks import held_out, prompt_text
from stepflash.weights.hub import resolve_model
from stepflash.weights.load import load_model

from .conftest import MICRO, drive, request

pytestmark = pytest.mark.skipif(
    not build.load(), reason="without native kernels a token's bits depend on the batch"
)
FROM_THE_HOST = (
    "aten::_local_scalar_dense",
    "aten::lift_fresh",
    "aten::nonzero",
    "aten::item",
    "aten::equal",
)

_library = torch.library.Library("stepflash_tests", "DEF")
_library.define(f"cached_attention{ops._SCHEMAS['cached_attention']}")


def token_by_token(*args: Any) -> Tensor:
    """The reference with every token as a sequence of its own: torch's products have other bits for more rows."""
    *before, block_table, seq_lens, cu_seqlens = args[:9]
    counts = cu_seqlens.diff().long()
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    lens = seq_lens[owner] - cu_seqlens[1:][owner] + torch.arange(1, len(owner) + 1, dtype=torch.int32)
    boundaries = torch.arange(len(owner) + 1, dtype=torch.int32)
    return reference.cached_attention(*before, block_table[owner], lens, boundaries, *args[9:])


_library.impl("cached_attention", token_by_token, "CompositeExplicitAutograd")


class Tape(TorchDispatchMode):
    """Records what is dispatched while it is entered; calling it does the same again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in FROM_THE_HOST, f"{func} cannot be captured"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self) -> None:
        now: dict[int, Tensor] = {}

        def renewed(value: Any) -> Any:
            return now.get(id(value), value)

        for func, args, kwargs, then in self.calls:
            out = func(*tree_map(renewed, args), **tree_map(renewed, kwargs))
            for old, new in zip(flat(then), flat(out), strict=True):
                now[id(old)] = new


def flat(result: Any) -> list[Any]:
    return [result] if isinstance(result, Tensor) else list(result or ())


def record(run: Callable[[], None], is_first: bool) -> Callable[[], None]:
    tape = Tape()
    with tape:
        run()
    return tape


def graph_network(core: EngineCore) -> GraphNetwork:
    assert not any(layer.is_native for layer in core.cache.layers.values()), "CUDA has the plain layout"
    return GraphNetwork(core.runner.model, core.cache, core.sampler.vocab_limit, record)


@pytest.fixture(autouse=True)
def opaque_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference asks for lengths as numbers, which no kernel does; a tape must not see into it."""
    monkeypatch.setattr(
        ops, "cached_attention", lambda *args: torch.ops.stepflash_tests.cached_attention(*args)
    )
    monkeypatch.setattr(cuda_replay, "LEAST_WIDTH", 2)


def new_core(quantization: str, **options: object) -> EngineCore:
    """Blocks of an odd size have the plain layout on the CPU, too."""
    model = load_model(MICRO, dtype="bfloat16", quantization=quantization, progress=False)
    config = {"max_num_seqs": 41, "block_size": 7, "max_model_len": 300} | options
    return EngineCore(model, EngineConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("quantization", ["bf16", "int4"])
def test_replayed_passes_compute_the_same(quantization: str, kv_dtype: torch.dtype) -> None:
    """Any mixture of decoding, verification and short chunks, trunk and modules, in any order of sequences: the same
    states, logits and choices, and the same cache; of the tokens that fill up nothing is left."""
    core = new_core(quantization, kv_dtype=kv_dtype)
    rng = random.Random(f"{quantization} {kv_dtype}")
    graphs, plain = graph_network(core), ModelNetwork(core.runner.model, core.cache)
    sequences = [[core.cache.open(), 0] for _ in range(40)]
    written = [tensor.clone() for tensor in cache_of(core)]
    for step in range(60):
        if step % 20 == 19:  # somebody ends, and another takes the row and some of the blocks
            ended = rng.randrange(len(sequences))
            core.cache.close(sequences[ended][0])
            sequences[ended] = [core.cache.open(), 0]
        spans: list[Span] = []
        room = rng.choice([1, 2, 3, 5, 8, 9, 17, 40, 64, 128])
        for entry in rng.sample(sequences, rng.choice([1, 2, 12, 40])):
            blocks, done = entry
            length = min(room, rng.choice([1, 1, 1, 2, 4, 30]))
            if length and done + length < 280:
                for group in (0, 1):
                    core.cache.grow(blocks, group, done + length + 7)
                spans.append(Span(blocks, done, [rng.randrange(512) for _ in range(length)]))
                room, entry[1] = room - length, done + length
        if not spans:
            continue
        num_tokens = sum(len(span.token_ids) for span in spans)
        rows = sorted(rng.sample(range(num_tokens), rng.randint(1, num_tokens)))
        with torch.inference_mode():
            expected = plain.trunk(spans, rows)
            got = graphs.trunk(spans, rows)
            check_equal(got, expected, core.sampler.vocab_limit)
            for module in (1, 2, 3):
                shifted = [Span(s.blocks, s.start + 3, s.token_ids) for s in spans]
                previous = got.hidden_states
                expected = plain.module(module, shifted, previous, rows)
                if module == 3:
                    for then, now in zip(written, cache_of(core), strict=True):
                        then.copy_(now)
                got = graphs.module(module, shifted, previous, rows)
                check_equal(got, expected, core.sampler.vocab_limit)
            assert all(map(torch.equal, cache_of(core), written))
    assert 20 < graphs.num_captured < 180
    assert len({key[-1] for key in graphs._graphs.replays}) > 2


def cache_of(core: EngineCore) -> list[Tensor]:
    layers = core.cache.layers.values()
    tensors = [t for layer in layers for t in (layer.keys, layer.values, layer.k_scale, layer.v_scale)]
    return [t for t in tensors if t is not None]


def check_equal(got: Pass, expected: Pass, vocab_limit: int) -> None:
    assert torch.equal(got.hidden_states, expected.hidden_states)
    assert torch.equal(got.logits, expected.logits)
    assert got.greedy is not None
    best = expected.logits[:, :vocab_limit].max(-1)
    assert got.greedy == (best.indices.tolist(), best.values.tolist())


def test_large_passes_and_passes_without_logits_run_as_ever() -> None:
    core = new_core("bf16")
    graphs, plain = graph_network(core), ModelNetwork(core.runner.model, core.cache)
    blocks = core.cache.open()
    for group in (0, 1):
        core.cache.grow(blocks, group, 200)
    with torch.inference_mode():
        for spans, rows in (([Span(blocks, 0, [5] * 129)], [128]), ([Span(blocks, 129, [5, 6])], [])):
            expected = plain.trunk(spans, rows)
            got = graphs.trunk(spans, rows)
            assert torch.equal(got.hidden_states, expected.hidden_states)
            assert torch.equal(got.logits, expected.logits)
    assert not graphs.num_captured


def test_the_best_token_is_below_the_limit_the_first_of_equals_and_tells_nan() -> None:
    core = new_core("bf16", vocab_limit=100)
    graphs = graph_network(core)
    blocks = core.cache.open()
    for group in (0, 1):
        core.cache.grow(blocks, group, 30)
    with torch.inference_mode():
        done = graphs.trunk([Span(blocks, 0, [5, 6, 7])], [0, 2])
        assert done.greedy is not None
        assert done.greedy[0] == done.logits[:, :100].argmax(-1).tolist()
        weight = core.runner.model.model.norm.weight
        weight.fill_(-1.0)  # all logits are zero
        equal = graphs.trunk([Span(blocks, 0, [5, 6, 7])], [0, 2])
        assert equal.greedy == ([0, 0], [0.0, 0.0])
        weight[0] = float("nan")
        broken = graphs.trunk([Span(blocks, 0, [5, 6, 7])], [0, 2])
    assert broken.greedy is not None
    assert all(map(math.isnan, broken.greedy[1]))


def test_what_cannot_be_captured_is_said_once_and_runs_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    core = new_core("int4")

    def refuse(run: Callable[[], None], is_first: bool) -> Callable[[], None]:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = GraphNetwork(core.runner.model, core.cache, core.sampler.vocab_limit, refuse)
    plain = ModelNetwork(core.runner.model, core.cache)
    blocks = core.cache.open()
    for group in (0, 1):
        core.cache.grow(blocks, group, 30)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        for start in (0, 3):
            spans = [Span(blocks, start, [5, 6, 7])]
            expected, got = plain.trunk(spans, [2]), graphs.trunk(spans, [2])
            assert torch.equal(got.logits, expected.logits)
            expected = plain.module(1, spans, expected.hidden_states, [2])
            got = graphs.module(1, spans, got.hidden_states, [2])
            assert torch.equal(got.logits, expected.logits)
    assert [r.message for r in caplog.records] == [
        "CUDA graphs are off, decoding will be slower: a pass could not be captured"
    ]


def nano_and_prompts() -> tuple[Step3p5ForCausalLM, list[list[int]]]:
    model = load_model("nano", dtype="bfloat16", quantization="stored", progress=False)
    tokenizer = Tokenizer.from_pretrained(resolve_model("nano"))
    tasks = ("add", "sort", "weekday")
    return model, [tokenizer.encode(prompt_text(held_out(task, 1, "easy")[0])) for task in tasks]


def test_what_has_no_room_runs_all_the_same_and_old_graphs_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_replay, "MOST_GRAPHS", 2)

    def capture(run: Callable[[], None], is_first: bool) -> Callable[[], None]:
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run

    graphs, calls = cuda_replay.Graphs(capture), []
    with caplog.at_level(logging.WARNING):
        for size in (1, 2, 2, 1, 3, 2, 1):
            key = "kind", size
            calls.append(graphs.run(key, lambda: None))
    assert calls == [True, False, False, True, True, True, True]
    assert list(graphs.replays) == [("kind", 2), ("kind", 1)]
    assert graphs.num_captured == 5
    assert not graphs.is_off
    assert [r.message.split(",")[0] for r in caplog.records] == ["not enough memory for a CUDA graph"]


@pytest.mark.parametrize("depth", [0, 1, 2, 3, None])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_engine_answers_the_same(
    depth: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nano, whose drafts are often right, with prompts that come while others decode."""
    model, prompts = nano_and_prompts()
    sampling = SamplingParams(max_tokens=40, temperature=temperature, top_p=0.95, seed=7, draft_depth=depth)
    asked = [
        Request(
            request_id=str(i), prompt_token_ids=tuple(prompt), sampling=replace(sampling, logprobs=logprobs)
        )
        for i, (prompt, logprobs) in enumerate(
            zip(prompts, (None, 2 if temperature else None, None), strict=True)
        )
    ]
    config = EngineConfig(max_num_seqs=2, max_model_len=512, block_size=15, max_num_batched_tokens=48)
    found = []
    for has_graphs in (False, True):
        core = EngineCore(model, config)
        core.runner.network = graph_network(core) if has_graphs else ModelNetwork(model, core.cache)
        plan = iter([3, 1, 0, 2, 3, 3, 1, 1, 0, 0] * 50)
        if depth is None:
            monkeypatch.setattr(core.depth, "choose", lambda *_, plan=plan: next(plan))
        finished = drive(core, *asked).values()
        found.append(
            [(f.token_ids, [o.logprobs for o in f.outputs], f.stats.num_accepted_tokens) for f in finished]
        )
        if has_graphs:
            assert core.runner.network.num_captured > 2
    assert found[0] == found[1]
    if depth and not temperature:
        assert sum(sum(accepted) for _, _, accepted in found[0]) > 5


@pytest.mark.parametrize("plan", [[1], [2], [3], [3, 3, 3, 1, 2, 2, 0, 3, 3]])
def test_drafts_within_the_trunk_s_call_leave_the_same_behind(
    plan: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step: tokens, drafts, what the modules have read and have yet to read, and every slot of the cache."""
    model, prompts = nano_and_prompts()
    config = EngineConfig(max_num_seqs=3, max_model_len=512, block_size=15, max_num_batched_tokens=300)
    cores, ahead = [EngineCore(model, config), EngineCore(model, config)], []
    cores[0].runner.network = ModelNetwork(model, cores[0].cache)
    cores[1].runner.network = network = graph_network(cores[1])
    run = network.trunk_ahead
    monkeypatch.setattr(network, "trunk_ahead", lambda *args: ahead.append(run(*args)) or ahead[-1])
    for core in cores:
        depths = iter(plan * 200)
        monkeypatch.setattr(core.depth, "choose", lambda *_, depths=depths: next(depths))
        for i, prompt in enumerate(prompts):
            core.add(request(str(i), prompt, max_tokens=100))
    num_steps = 0
    # Near the end there is no room for all drafts, and the modules are asked again.
    while all(seq.num_generated < 90 for core in cores for seq in core.scheduler.running):
        for core in cores:
            core.step()
        num_steps += 1
        for expected, got in zip(*(core.scheduler.running for core in cores), strict=True):
            assert (got.token_ids, got.drafts, got.num_computed) == (
                expected.token_ids,
                expected.drafts,
                expected.num_computed,
            )
            assert got.mtp.num_computed == expected.mtp.num_computed
            assert_same(got.mtp.pending, expected.mtp.pending)
            assert_same(got.mtp.at_last_boundary, expected.mtp.at_last_boundary)
            assert_same(got.boundary, expected.boundary)
        assert all(map(torch.equal, *map(cache_of, cores)))
    assert num_steps > 15
    assert sum(cores[0].stats().num_accepted_tokens) > 5
    assert sum(done is not None for done in ahead) > num_steps / 3
    assert any(key[0] == "ahead" for key in network._graphs.replays)


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected


def test_biased_requests_read_the_logits() -> None:
    """Where a bias decides, the sampler works on the pass's own logits."""
    few = {7: 100.0, 31: 100.0, 55: 100.0}
    asked = [
        request(str(i), [9 + i] * (10 + i), max_tokens=20, logit_bias=few if i % 2 else {}) for i in range(5)
    ]
    found = []
    for has_graphs in (False, True):
        core = new_core("int4", max_num_seqs=4)
        core.runner.network = (
            graph_network(core) if has_graphs else ModelNetwork(core.runner.model, core.cache)
        )
        found.append({name: entry.token_ids for name, entry in drive(core, *asked).items()})
    assert found[0] == found[1]


def test_only_greedy_passes_are_read_before_their_tokens_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads waits for the device; sampling is to be on its way before."""
    core = new_core("int4")
    core.runner.network = graph_network(core)
    reads, read = [], GraphNetwork._greedy
    monkeypatch.setattr(GraphNetwork, "_greedy", lambda *args: reads.append(args) or read(*args))
    sampled = {"max_tokens": 4, "temperature": 0.8, "top_p": 0.9, "draft_depth": 2, "seed": 1}
    drive(core, request("sampled", [3, 4, 5], **sampled))
    assert not reads
    drive(core, request("greedy", [3, 4, 5], max_tokens=4, draft_depth=0))
    assert reads
