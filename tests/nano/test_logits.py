"""nano's logits, dense and through the engine, against the equations in float64 (`tests/model/reference.py`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.sampler import Row
from stepflash.engine.speculative import DraftJob
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.nano.tasks import completion, held_out, prompt_text
from stepflash.weights.hub import resolve_model
from stepflash.weights.load import load_model
from tests.engine.conftest import drive, request
from tests.model.reference import Reference

TOLERANCE = 2e-4  # in log-probability


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of the file; an fp8 weight times its scales, one per block of 128 x 128."""
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        values = tensor.float()
        if f"{name}_scale_inv" in stored:
            scales = stored[f"{name}_scale_inv"].float()
            spread = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)
            values = values * spread[..., : values.shape[-2], : values.shape[-1]]
        tensors[name] = values.numpy()
    return tensors


@pytest.fixture(scope="module")
def nano() -> Step3p5ForCausalLM:
    return load_model("nano", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Longer than the window of 64: a problem, its solution and the beginning of another."""
    from stepflash.chat.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(resolve_model("nano"))
    words = "".join(prompt_text(e) + completion(e.messages[-1]) for e in held_out("word_problem", 3, "easy"))
    token_ids = tokenizer.encode(words)[:150]
    assert len(token_ids) > 2 * 64
    return token_ids


@pytest.fixture(scope="module")
def expected(text: list[int]) -> tuple[Tensor, list[Tensor]]:
    folder = resolve_model("nano")
    raw = json.loads((folder / "config.json").read_text())
    reference = Reference(raw, decoded(folder))
    trunk = torch.from_numpy(reference.logits(text)).log_softmax(-1)
    return trunk, [torch.from_numpy(rows).log_softmax(-1) for rows in reference.mtp_logits(text)]


def test_the_network_equals_the_equations(
    nano: Step3p5ForCausalLM, text: list[int], expected: tuple[Tensor, list[Tensor]]
) -> None:
    trunk, modules = expected
    ids = torch.tensor(text)
    assert (nano.logits(ids).double().log_softmax(-1) - trunk).abs().max() < TOLERANCE
    ours = nano.mtp_logits(ids)
    for k, rows in enumerate(modules, start=1):
        assert (ours[k - 1, : len(text) - k].double().log_softmax(-1) - rows).abs().max() < TOLERANCE


@pytest.mark.parametrize("chunk", [5, 64])
def test_the_engine_equals_the_equations(
    nano: Step3p5ForCausalLM,
    text: list[int],
    expected: tuple[Tensor, list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    """The answer is dictated by a constraint; what is compared are the logits before any mask."""
    trunk, modules = expected
    start = 90

    class Dictation:
        """Allows the text and nothing else, but says nothing is forced, so that the modules draft."""

        def __init__(self) -> None:
            self.at = start

        def mask(self) -> list[int]:
            return [text[self.at]] if self.at < len(text) else [0]

        def accept(self, token_id: int) -> None:
            assert token_id in self.mask()
            self.at += 1

        def rollback(self, num_tokens: int) -> None:
            self.at -= num_tokens

        def forced(self) -> list[int]:
            return []

    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=chunk, max_model_len=512, block_size=8)
    core = EngineCore(nano, config)
    drafted: list[tuple[int, int, Tensor]] = []
    seen: list[tuple[int, Tensor]] = []
    choose, commit = core.sampler.choose, core._commit_drafts

    def record(logits: Tensor, rows: Sequence[Row], *rest: Any) -> object:
        seen.extend((row.position, line.clone()) for row, line in zip(rows, logits, strict=True))
        return choose(logits, rows, *rest)

    def note(job: DraftJob) -> None:
        known = len(job.seq.token_ids)
        # Rows of the trunk stood at places that are known by now; module k proposes for place known + k - 1.
        drafted.extend((place - known + 1, known, logits) for place, logits in seen if place >= known)
        seen.clear()
        commit(job)

    monkeypatch.setattr(core.sampler, "choose", record)
    monkeypatch.setattr(core, "_commit_drafts", note)
    asked = request(
        "a",
        text[:start],
        max_tokens=len(text) - start,
        logprobs=20,
        draft_depth=3,
        constraint=Dictation(),
        ignore_eos=True,
    )
    done = drive(core, asked)["a"]
    assert done.token_ids == text[start:]
    assert sum(done.stats.num_accepted_tokens) > 20
    logprobs = [entry for output in done.outputs for entry in output.logprobs]
    for position, entry in enumerate(logprobs, start):
        row = trunk[position - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=TOLERANCE)
        for token_id, logprob in entry.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
    # Drafts were right (they are dictated), so module k spoke about the text itself: position known - 2 of it.
    assert len(drafted) > 30
    for module, known, logits in drafted:
        assert known - 2 < len(modules[module - 1])
        difference = logits.double().log_softmax(-1) - modules[module - 1][known - 2]
        assert difference.abs().max() < TOLERANCE, (module, known)
