"""The engine on a CUDA device: replayed passes against passes launched one by one, drafts against none.

Skipped where there is no device. What decides which token comes next must not depend on how a pass is launched, nor
on how many tokens it verifies. `test_cuda_graphs.py` has the same passes on the CPU, without CUDA.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.batch import Span
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.cuda_graphs import GraphNetwork
from stepflash.engine.network import ModelNetwork
from stepflash.engine.request import Request, SamplingParams
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.nano.tasks import held_out, prompt_text
from stepflash.weights.hub import resolve_model
from stepflash.weights.load import load_model

from .conftest import MICRO, collect, drive, next_spans

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("default"),  # compilers warn of their own settings
]


def new_core(model: Step3p5ForCausalLM, has_graphs: bool, **options: object) -> EngineCore:
    config = {"max_num_seqs": 8, "max_model_len": 512, "max_num_batched_tokens": 96} | options
    core = EngineCore(model, EngineConfig(**config))  # type: ignore[arg-type]
    assert isinstance(core.runner.network, GraphNetwork)
    if not has_graphs:
        core.runner.network = ModelNetwork(model, core.cache)
    return core


def num_captured(core: EngineCore) -> int:
    """How many there are, if all passes could be captured."""
    network = core.runner.network
    assert isinstance(network, GraphNetwork)
    assert not network._graphs.is_off
    return network.num_captured


@pytest.fixture(scope="module")
def nano() -> Step3p5ForCausalLM:
    return load_model("nano", dtype="bfloat16", device=DEVICE, quantization="stored", progress=False)


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_pretrained(resolve_model("nano"))
    tasks = ("add", "sort", "weekday")
    return [tuple(tokenizer.encode(prompt_text(held_out(task, 1, "easy")[0]))) for task in tasks]


class Odd:
    """A constraint: only odd tokens."""

    def mask(self) -> range:
        return range(1, 1000, 2)

    def accept(self, token_id: int) -> None:
        assert token_id % 2

    def rollback(self, num_tokens: int) -> None: ...

    def forced(self) -> tuple[int, ...]:
        return ()


def requests(prompts: Sequence[Sequence[int]], **options: object) -> list[Request]:
    options = {"max_tokens": 40, "temperature": 0.0, "draft_depth": 0} | options
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**options),  # type: ignore[arg-type]
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("quantization", "kv_dtype"),
    [("bf16", torch.bfloat16), ("int8", torch.int8), ("int4", torch.bfloat16)],
)
def test_replayed_passes_compute_the_same(quantization: str, kv_dtype: torch.dtype) -> None:
    """Filled up and not, trunk and modules, each graph used twice; what fills up writes nothing."""
    model = load_model(MICRO, dtype="bfloat16", device=DEVICE, quantization=quantization, progress=False)
    core = new_core(model, True, kv_dtype=kv_dtype)
    graphs, plain, rng = core.runner.network, ModelNetwork(model, core.cache), random.Random(5)
    sequences = [core.cache.open() for _ in range(4)]
    done = [0] * 4
    for lengths in ((4, 2, 3, 1), (1, 4, 4, 1), (1, 1, 1, 1), (1, 1, 1, 1), (4, 1, 4, 1)):
        spans = next_spans(core, sequences, done, lengths, rng)
        rows = list(range(sum(lengths)))[-5:]
        with torch.inference_mode():
            previous = None
            for module in range(4):
                shifted = [Span(s.blocks, s.start + module, s.token_ids) for s in spans]
                results = []
                for network in (plain, graphs):
                    if previous is None:
                        results.append(network.trunk(shifted, rows))
                    else:
                        results.append(network.module(module, shifted, previous, rows))
                expected, got = results
                previous = expected.hidden_states
                scale = previous.float().abs().max()
                assert (got.hidden_states.float() - previous.float()).abs().max() <= 0.02 * scale
                assert (got.logits - expected.logits).abs().max() <= 0.02 * expected.logits.abs().max()
                if got.greedy is not None:
                    best = got.logits.max(-1)
                    assert got.greedy == (best.indices.tolist(), best.values.tolist())
    assert num_captured(core) == 8  # passes of 12 and of 4 tokens


def test_greedy_answers_are_the_same_with_graphs_and_drafts(
    nano: Step3p5ForCausalLM, prompts: list[tuple[int, ...]]
) -> None:
    found = {}
    for has_graphs, depth in ((False, 0), (True, 0), (False, 3), (True, 3)):
        core = new_core(nano, has_graphs)
        finished = drive(core, *requests(prompts, draft_depth=depth))
        found[has_graphs, depth] = {name: entry.token_ids for name, entry in finished.items()}
        if has_graphs:
            assert num_captured(core) > 1
        if depth:
            assert sum(sum(entry.stats.num_accepted_tokens) for entry in finished.values()) > 10
    assert all(tokens == found[False, 0] for tokens in found.values())


def test_prompts_that_come_while_others_decode(
    nano: Step3p5ForCausalLM, prompts: list[tuple[int, ...]]
) -> None:
    """Passes of chunks and of single tokens, large and small ones in turn; greedy, sampled, with a bias and with a
    constraint."""
    found = []
    for has_graphs in (False, True):
        core, finished = new_core(nano, has_graphs), {}
        waiting = [
            *requests([prompts[0]], draft_depth=2),
            *[
                replace(r, request_id="sampled")
                for r in requests([prompts[1]], temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=3)
            ],
            *[
                replace(r, request_id="long")
                for r in requests([prompts[2] * 6], logit_bias={5: 1.0}, draft_depth=1)
            ],
            *[
                replace(r, request_id="odd", constraint=Odd())
                for r in requests([prompts[1]], draft_depth=3, ignore_eos=True)
            ],
        ]
        while waiting or core.has_work:
            if waiting:
                core.add(waiting.pop(0))
            for _ in range(4):
                collect(finished, core.step())
        core.check_integrity()
        assert all(entry.last.error is None for entry in finished.values())
        found.append({name: entry.token_ids for name, entry in finished.items()})
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_a_greedy_step_waits_for_the_device_once(
    nano: Step3p5ForCausalLM, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all its tokens and all its drafts."""
    core = new_core(nano, True, prefix_caching=False)
    asked = requests(prompts, draft_depth=3)
    drive(core, *asked)  # the second time all is captured
    before = num_captured(core)
    for request in asked:
        core.add(request)
    core.step()
    while not core.is_decoding:
        core.step()
    reads, read = [], torch.Tensor.cpu

    def reading(tensor: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        reads.append(read(tensor))
        torch.cuda.set_sync_debug_mode("error")
        return reads[-1]

    monkeypatch.setattr(torch.Tensor, "cpu", reading)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = [output for _ in range(3) for output in core.step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [output.error for output in outputs] == [None] * 9
    assert len(reads) == 3
    assert num_captured(core) == before


def test_what_cannot_be_captured_runs_all_the_same(
    prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pass that waits for the device is found before it is captured: nothing is left in disorder."""
    model = load_model(MICRO, dtype="bfloat16", device=DEVICE, quantization="int4", progress=False)
    asked = requests([[9, 8, 7], [6, 5]], max_tokens=10, ignore_eos=True)
    expected = {name: entry.token_ids for name, entry in drive(new_core(model, False), *asked).items()}
    logits_of = Step3p5ForCausalLM.compute_logits

    def waiting(self: Step3p5ForCausalLM, hidden_states: torch.Tensor) -> torch.Tensor:
        assert hidden_states.sum().item() is not None
        return logits_of(self, hidden_states)

    monkeypatch.setattr(Step3p5ForCausalLM, "compute_logits", waiting)
    core = new_core(model, True)
    with caplog.at_level(logging.WARNING):
        found = {name: entry.token_ids for name, entry in drive(core, *asked).items()}
    assert found == expected
    assert [r.message.split(",")[0] for r in caplog.records] == ["CUDA graphs are off"]
    torch.cuda.empty_cache()  # raises after a capture that was broken off
