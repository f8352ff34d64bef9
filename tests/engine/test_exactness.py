"""Greedy output is one and the same however it is computed (golden), and so is seeded sampling (property).

Golden tokens are those of transformers; logits and drafts are compared with a dense recomputation by the model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.prefix import Node
from stepflash.engine.sampler import Row
from stepflash.engine.speculative import DraftJob
from stepflash.kernels import build
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import load_model
from stepflash.weights.quantized import quantize_model
from tests.engine.conftest import FEW_TOKENS, MICRO, drive, request

NewCore = Callable[..., EngineCore]
Golden = tuple[list[int], list[int]]
PROPERTY = settings(max_examples=8)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, None])
def test_greedy_equals_transformers_at_every_depth(
    new_core: NewCore, golden: Golden, depth: int | None
) -> None:
    prompt, expected = golden
    done = drive(new_core(), request("a", prompt, max_tokens=96, draft_depth=depth))["a"]
    assert done.token_ids == expected
    assert done.last.finish_reason == "length"
    if depth:
        assert done.stats.num_drafted_tokens[depth - 1] > 0


@PROPERTY
@given(chunk=st.integers(1, 200), block_size=st.sampled_from([4, 8, 16, 32]), depth=st.integers(0, 3))
def test_greedy_equals_transformers_with_any_chunks(
    new_core: NewCore, golden: Golden, chunk: int, block_size: int, depth: int
) -> None:
    prompt, expected = golden
    core = new_core(max_num_batched_tokens=chunk, block_size=block_size, max_num_seqs=1)
    done = drive(core, request("a", prompt, max_tokens=24, draft_depth=depth))["a"]
    assert done.token_ids == expected[:24]


def test_greedy_equals_transformers_among_others(new_core: NewCore, golden: Golden) -> None:
    prompt, expected = golden
    others = [
        request(
            f"other-{i}",
            prompt[i : 3 * i + 5],
            temperature=0.5 * i,
            max_tokens=20 + 7 * i,
            draft_depth=i % 4,
            seed=i,
        )
        for i in range(9)
    ]
    core = new_core(max_num_batched_tokens=40)
    done = drive(core, *others[:5], request("a", prompt, max_tokens=96, draft_depth=2), *others[5:])
    assert done["a"].token_ids == expected


@pytest.mark.parametrize("depth", [0, 3])
def test_greedy_equals_transformers_after_a_prefix_hit(new_core: NewCore, golden: Golden, depth: int) -> None:
    prompt, expected = golden
    core = new_core()
    for name, num_cached in (("cold", 0), ("warm", 152)):
        done = drive(core, request(name, prompt, max_tokens=40, draft_depth=depth))[name]
        assert done.token_ids == expected[:40]
        assert done.stats.num_cached_tokens == num_cached
    longer = drive(core, request("next", prompt + expected[:40], max_tokens=56, draft_depth=depth))["next"]
    assert longer.token_ids == expected[40:]
    assert longer.stats.num_cached_tokens == 192  # of 199 computed tokens, down to a block boundary
    assert longer.stats.num_prefill_tokens == 8


def test_greedy_equals_transformers_after_preemption(new_core: NewCore, golden: Golden) -> None:
    prompt, expected = golden
    # Room for one and a half of these sequences: the later one has to give way and come back.
    core = new_core(max_num_seqs=2, max_model_len=288, kv_cache_bytes=1_850_000, prefix_caching=False)
    assert core.cache.capacity_tokens < 2 * 256
    first = request("first", prompt, max_tokens=96, draft_depth=3)
    done = drive(core, first, request("second", prompt[:100], max_tokens=150, draft_depth=1))
    assert done["first"].token_ids == expected
    assert core.scheduler.num_preemptions > 0
    alone = drive(new_core(), request("second", prompt[:100], max_tokens=150, draft_depth=0))["second"]
    assert done["second"].token_ids == alone.token_ids


@PROPERTY
@given(
    chunk=st.integers(1, 80),
    depth=st.sampled_from([1, 2, 3, None]),
    with_others=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_seeded_sampling_is_the_same_at_any_depth_and_in_any_batch(
    new_core: NewCore, golden: Golden, chunk: int, depth: int | None, with_others: bool, seed: int
) -> None:
    prompt = golden[0][:50]
    sampling = {
        "max_tokens": 24,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": seed,
        "presence_penalty": 0.5,
        "logit_bias": FEW_TOKENS,
    }
    alone = drive(new_core(), request("a", prompt, draft_depth=0, **sampling))["a"]
    core = new_core(max_num_batched_tokens=chunk)
    others = [
        request(f"o{i}", prompt[i:], temperature=1.0, max_tokens=10 + i) for i in range(3 * with_others)
    ]
    done = drive(core, *others, request("a", prompt, draft_depth=depth, **sampling))["a"]
    assert done.token_ids == alone.token_ids


def test_cached_logits_equal_the_full_forward(
    new_core: NewCore, model: Step3p5ForCausalLM, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, expected = golden
    core = new_core(max_num_batched_tokens=37)
    seen: dict[int, Tensor] = {}
    choose = core.sampler.choose

    def record(logits: Tensor, rows: list[Row], greedy: tuple[Tensor, Tensor] | None) -> object:
        seen.update({row.position: line for row, line in zip(rows, logits, strict=True)})
        return choose(logits, rows, greedy)

    monkeypatch.setattr(core.sampler, "choose", record)
    drive(core, request("a", prompt, max_tokens=96, draft_depth=0))
    dense = model.logits(torch.tensor(prompt + expected))
    assert sorted(seen) == list(range(160, 256))
    for position, logits in seen.items():
        # Logits reach 10 here; 1e-5 is relative to that.
        torch.testing.assert_close(logits, dense[position - 1], rtol=1e-5, atol=1e-4)
        assert (logits.log_softmax(-1) - dense[position - 1].log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_drafts_equal_a_dense_recomputation(
    new_core: NewCore,
    model: Step3p5ForCausalLM,
    golden: Golden,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    biased: bool,
) -> None:
    """Each round, draft k is module k's choice on the known tokens and the drafts before it, all from scratch."""
    prompt = golden[0]
    bias = FEW_TOKENS if biased else {}
    core = new_core(max_num_batched_tokens=chunk)
    rounds: list[tuple[list[int], list[int]]] = []
    commit = core._commit_drafts

    def record(job: DraftJob) -> None:
        if job.drafts:
            rounds.append((list(job.seq.token_ids), list(job.drafts)))
        commit(job)

    monkeypatch.setattr(core, "_commit_drafts", record)
    drive(core, request("cold", prompt[:90], max_tokens=30, draft_depth=3, logit_bias=bias))
    # Continues from snapshots, so the modules' cached state is part of what is tested; then tiny prompts.
    warm = drive(core, request("warm", prompt[:90], max_tokens=12, draft_depth=3, logit_bias=bias))["warm"]
    assert warm.stats.num_cached_tokens == 88
    for length in (1, 2, 3, 4):
        drive(core, request(f"short{length}", prompt[:length], max_tokens=6, draft_depth=3, logit_bias=bias))
    assert len(rounds) > 25
    for token_ids, drafts in rounds:
        check_drafts(model, token_ids, drafts, bias)
    num_full = sum(len(drafts) == 3 for _, drafts in rounds)
    assert num_full > 20
    if biased:
        assert sum(warm.stats.num_accepted_tokens) > 2


def test_drafts_of_deferred_modules_are_exact(
    new_core: NewCore, model: Step3p5ForCausalLM, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adaptive depth leaves modules behind and takes them up again; what they then say must be the same."""
    core = new_core(max_deferred_tokens=9)
    depths = [0, 0, 3, 1, 1, 1, 3, 0, 2, 2, 3] + [0] * 30 + [3, 1, 2, 3]
    plan = iter(depths * 3)
    monkeypatch.setattr(core.depth, "choose", lambda *_: next(plan))
    rounds: list[tuple[list[int], list[int]]] = []
    commit = core._commit_drafts

    def record(job: DraftJob) -> None:
        rounds.append((list(job.seq.token_ids), list(job.drafts)))
        commit(job)

    monkeypatch.setattr(core, "_commit_drafts", record)
    drive(core, request("a", golden[0], max_tokens=60, logit_bias=FEW_TOKENS))
    for token_ids, drafts in rounds:
        if drafts:
            check_drafts(model, token_ids, drafts, FEW_TOKENS)
    assert sum(len(drafts) for _, drafts in rounds) > 30
    # Wherever the modules stood, the end of the answer can be continued, drafts included.
    (snapshot,) = [node for node in core.prefix.snapshots() if node.depth * 8 > len(golden[0])]  # type: ignore[union-attr]
    assert snapshot.depth == (len(golden[0]) + 60 - 1) // 8
    rounds.clear()
    whole = [t for node in path_to(snapshot) for t in node.token_ids]
    warm = drive(core, request("warm", [*whole, 7, 31], max_tokens=8, draft_depth=3, logit_bias=FEW_TOKENS))[
        "warm"
    ]
    assert warm.stats.num_cached_tokens == len(whole)
    for token_ids, drafts in rounds:
        check_drafts(model, token_ids, drafts, FEW_TOKENS)


def path_to(node: Node) -> list[Node]:
    return [] if node.parent is None else [*path_to(node.parent), node]


def check_drafts(
    model: Step3p5ForCausalLM, token_ids: list[int], drafts: list[int], bias: dict[int, float]
) -> None:
    """Draft k is module k's greedy choice at the last computed position, in one dense pass over everything."""
    logits = model.mtp_logits(torch.tensor(token_ids + drafts[:-1]))[:, len(token_ids) - 2].clone()
    logits[:, list(bias)] += torch.tensor(list(bias.values()))
    for k, draft in enumerate(drafts):
        # A tie within rounding may go either way.
        assert draft == int(logits[k].argmax()) or logits[k].max() - logits[k, draft] < 1e-4, (token_ids, k)


@pytest.mark.parametrize(("quantization", "kv_dtype"), [("int4", torch.int8), ("bf16", None)])
def test_packed_weights_give_the_same_bits_at_any_depth_and_in_any_batch(
    golden: Golden, quantization: str, kv_dtype: torch.dtype | None
) -> None:
    """The native kernels compute a token alike whatever is beside it, so even bf16 has one greedy output."""
    if not build.load():
        pytest.skip("no native kernels: there is no compiler, or they are switched off")
    prompt, _ = golden
    packed = quantize_model(load_model(MICRO, progress=False), quantization)
    outputs = []
    for chunk, depth, num_others in ((64, 0, 0), (17, 0, 0), (64, 3, 0), (23, 3, 3), (64, None, 2)):
        config = EngineConfig(
            max_num_seqs=4,
            max_num_batched_tokens=chunk,
            max_model_len=512,
            kv_dtype=kv_dtype,
            kv_cache_bytes=32 << 20,
        )
        others = [
            request(f"o{i}", prompt[i : i + 40], temperature=1.0, max_tokens=30) for i in range(num_others)
        ]
        asked = request("a", prompt, max_tokens=50, draft_depth=depth, logit_bias=FEW_TOKENS)
        done = drive(EngineCore(packed, config), *others, asked)["a"]
        outputs.append(done.token_ids)
        if depth == 3:
            assert sum(done.stats.num_accepted_tokens) > 0
    assert all(other == outputs[0] for other in outputs)
