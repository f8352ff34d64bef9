"""The native pass of a packed model against the model's own modules, and drafts in a row against one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine import core as core_module
from stepflash.engine import network, runner, speculative
from stepflash.engine.batch import Span
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.network import Ahead, Drafts, ModelNetwork, NativeNetwork, Pass
from stepflash.engine.request import Request, SamplingParams
from stepflash.kernels import build
from stepflash.model import transformer
from stepflash.nano.tasks import held_out, prompt_text
from stepflash.weights.hub import resolve_model
from stepflash.weights.load import load_model

from .conftest import MICRO, next_spans

pytestmark = pytest.mark.skipif(not build.load(), reason="no native kernels: no compiler or no AVX2")
FORMATS = ("bf16", "int8", "int4", "fp8")


def new_core(quantization: str, **options: object) -> EngineCore:
    torch.set_num_threads(2)
    model = load_model(MICRO, dtype="bfloat16", quantization=quantization, progress=False)
    return EngineCore(model, EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("quantization", FORMATS)
def test_both_networks_compute_the_same(
    quantization: str, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, decoding and verification of several sequences in one batch, trunk and modules, every format."""
    # The C library rounds cosines better than torch, so torch is given a wider angle.
    monkeypatch.setattr(transformer, "rotation", exact_rotation)
    core = new_core(quantization, kv_dtype=kv_dtype)
    native, rng = core.runner.network, random.Random(3)
    assert isinstance(native, NativeNetwork)
    plain = ModelNetwork(core.runner.model, core.cache)
    sequences = [core.cache.open() for _ in range(3)]
    done = [0, 0, 0]
    for lengths in ((40, 7, 1), (1, 30, 4), (3, 1, 2), (60, 60, 60), (1, 1, 1)):
        spans = next_spans(core, sequences, done, lengths, rng)
        rows = sorted(rng.sample(range(sum(lengths)), min(sum(lengths), 5)))
        with torch.inference_mode():
            expected = plain.trunk(spans, rows)
            check_equal(native.trunk(spans, rows), expected)
            for module in (1, 2, 3):
                shifted = [Span(s.blocks, s.start + 3, s.token_ids) for s in spans]
                previous = expected.hidden_states
                expected = plain.module(module, shifted, previous, rows)
                check_equal(native.module(module, shifted, previous, rows), expected)


def exact_rotation(inverse: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = (positions.to(torch.float32)[:, None, None] * inverse).double()
    return angles.cos().float(), angles.sin().float()


def check_equal(got: Pass, expected: Pass) -> None:
    assert torch.equal(got.hidden_states, expected.hidden_states)
    assert torch.equal(got.logits, expected.logits)
    assert got.greedy is not None
    assert got.greedy[0] == got.logits.argmax(-1).tolist()
    assert got.greedy[1] == got.logits.amax(-1).tolist()


def test_best_token_stays_below_the_limit_and_tells_nan() -> None:
    core = new_core("bf16", vocab_limit=100)
    blocks = core.cache.open()
    for group in (0, 1):
        core.cache.grow(blocks, group, 20)
    spans = [Span(blocks, 0, [5, 6, 7])]
    with torch.inference_mode():
        done = core.runner.network.trunk(spans, [0, 2])
        assert done.greedy is not None
        assert done.greedy[0] == done.logits[:, :100].argmax(-1).tolist()
        core.runner.model.model.embed_tokens.weight[6, 0] = float("nan")
        broken = core.runner.network.trunk(spans, [2])
        # A block that held the broken sequence serves the next one, and nothing of it is left.
        core.cache.close(blocks)
        blocks = core.cache.open()
        for group in (0, 1):
            core.cache.grow(blocks, group, 20)
        whole = core.runner.network.trunk([Span(blocks, 0, [5, 7])], [0, 1])
    assert broken.greedy is not None
    assert all(map(math.isnan, broken.greedy[1]))
    assert whole.greedy is not None
    assert all(map(math.isfinite, whole.greedy[1]))


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, None])
def test_drafts_are_the_same_however_they_are_made(
    depth: int | None, prefix_caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps in a call, within the trunk's call, in a call of their own, or module by module: same tokens,
    statistics and states for the prefix cache, for nano and three sequences; with a depth that changes, too."""
    torch.set_num_threads(2)
    model = load_model("nano", dtype="bfloat16", quantization="stored", progress=False)
    found, used, kept = [], [], []
    for way in ("several steps", "ahead", "in a row", "one by one"):
        config = EngineConfig(max_num_seqs=4, max_model_len=512, prefix_caching=prefix_caching)
        core = EngineCore(model, config)
        num_ahead, num_in_a_row = count_drafts(monkeypatch, "trunk_ahead"), count_drafts(monkeypatch, "draft")
        monkeypatch.setattr(network, "AHEAD_SECONDS", 10.0)
        if way != "several steps":
            monkeypatch.setattr(core_module, "MAX_STEPS_AHEAD", 1)
        if way not in ("several steps", "ahead"):
            monkeypatch.setattr(runner, "depth_ahead", lambda *_: 0)
        if way == "one by one":
            monkeypatch.setattr(speculative, "_is_plain", lambda *_: False)
            monkeypatch.setattr(speculative, "_waits", lambda *_: False)
        plan = iter([3, 1, 0, 2, 3, 3, 1, 1, 0, 0] * 50)
        if depth is None:
            monkeypatch.setattr(core.depth, "choose", lambda *_, plan=plan: next(plan))
        snapshots: list[tuple[str, int, list[list[float]]]] = []
        monkeypatch.setattr(
            core,
            "_snapshot",
            lambda seq, boundary, carries, to=snapshots: to.append(
                (seq.request.request_id, boundary, [row.tolist() for row in carries])
            ),
        )
        found.append(drive_all(core, depth))
        kept.append(snapshots)
        used.append((sum(num_ahead), sum(num_in_a_row)))
        core.check_integrity()
        monkeypatch.undo()
    assert found[0] == found[1] == found[2] == found[3]
    assert kept[0] == kept[1] == kept[2] == kept[3]
    assert not prefix_caching or len({boundary for _, boundary, _ in kept[0]}) > 1
    assert sum(sum(stats[1]) for _, stats in found[0].values()) > 20
    (fewer, _), (ahead, _), (none_ahead, in_a_row), nothing = used
    assert ahead > 5
    # With a cache all modules read along, and those that do not draft have something to say between steps.
    assert fewer < ahead if depth == 3 or (depth and not prefix_caching) else fewer == ahead
    assert none_ahead == 0
    assert in_a_row > 5
    assert nothing == (0, 0)


def count_drafts(monkeypatch: pytest.MonkeyPatch, method: str) -> list[bool]:
    """Which calls of a method brought drafts."""
    calls: list[bool] = []
    run: Callable[..., object] = getattr(NativeNetwork, method)

    def counting(self: NativeNetwork, *arguments: object) -> object:
        done = run(self, *arguments)
        calls.append(isinstance(done, Drafts) or (isinstance(done, Ahead) and done.drafts is not None))
        return done

    monkeypatch.setattr(NativeNetwork, method, counting)
    return calls


Found = dict[str, tuple[list[int], tuple[Any, ...]]]


def drive_all(core: EngineCore, depth: int | None) -> Found:
    """Tokens; and steps, accepted and drafted tokens, and how it ended."""
    tokenizer = Tokenizer.from_pretrained(resolve_model("nano"))
    found: Found = {}
    for task in ("add", "sort", "weekday"):
        prompt = tokenizer.encode(prompt_text(held_out(task, 1, "easy")[0]))
        sampling = SamplingParams(max_tokens=60, temperature=0.0, draft_depth=depth)
        core.add(Request(request_id=task, prompt_token_ids=tuple(prompt), sampling=sampling))
        found[task] = [], ()
    while core.has_work:
        for output in core.step():
            tokens, end = found[output.request_id]
            if (stats := output.stats) is not None and output.finish_reason is not None:
                counts = tuple(stats.num_accepted_tokens), tuple(stats.num_drafted_tokens)
                end = stats.num_steps, *counts, output.finish_reason, output.stop_reason
            found[output.request_id] = [*tokens, *output.token_ids], end
    return found


@pytest.mark.parametrize("place", [9, 12, 19, 26])
def test_a_failure_within_several_steps_is_the_same_as_in_one(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token whose embedding is not a number ends its request; what came before, and others, are as ever."""
    torch.set_num_threads(2)
    monkeypatch.setattr(network, "AHEAD_SECONDS", 10.0)
    found = []
    for max_steps in (16, 1):
        monkeypatch.setattr(core_module, "MAX_STEPS_AHEAD", max_steps)
        model = load_model("nano", dtype="bfloat16", quantization="stored", progress=False)
        good = drive_all(EngineCore(model, EngineConfig(max_num_seqs=4, max_model_len=512)), 3)
        tokens, _ = good["weekday"]
        broken = tokens[place]
        with torch.inference_mode():
            model.model.embed_tokens.weight[broken] = float("nan")
        found.append(drive_all(EngineCore(model, EngineConfig(max_num_seqs=4, max_model_len=512)), 3))
        for task, (got, end) in found[-1].items():
            expected = good[task][0]
            if broken in expected[:-1]:
                assert end[3] == "error"
                # Lost are at most the drafts of the step that fails.
                assert got == expected[: len(got)]
                assert 0 <= expected.index(broken) + 1 - len(got) <= 3
            else:
                assert got == expected
    assert found[0] == found[1]


def test_steps_that_are_not_short_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "AHEAD_SECONDS", 0.0)
    model = load_model("nano", dtype="bfloat16", quantization="stored", progress=False)
    calls = count_drafts(monkeypatch, "trunk_ahead")
    one_by_one = drive_all(EngineCore(model, EngineConfig(max_num_seqs=4, max_model_len=512)), 3)
    num_calls = len(calls)
    monkeypatch.setattr(network, "AHEAD_SECONDS", 10.0)
    assert drive_all(EngineCore(model, EngineConfig(max_num_seqs=4, max_model_len=512)), 3) == one_by_one
    assert len(calls) - num_calls < num_calls
