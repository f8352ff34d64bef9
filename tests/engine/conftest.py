"""What the engine's tests share: the micro checkpoint in fp32, its golden tokens, and a way to drive a core."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import pytest

from stepflash.engine.batch import Span
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.kv_cache import SequenceBlocks
from stepflash.engine.request import Output, Request, RequestStats, SamplingParams
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import load_model

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
# Greedy decoding among eight tokens: the random MTP modules then guess right often enough to be tested.
FEW_TOKENS = {7: 100.0, 31: 100.0, 55: 100.0, 102: 100.0}


class Finished:
    """All that a request brought."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.outputs: list[Output] = []

    @property
    def last(self) -> Output:
        return self.outputs[-1]

    @property
    def stats(self) -> RequestStats:
        assert self.last.stats is not None
        return self.last.stats


Driver = Callable[..., dict[str, Finished]]


@pytest.fixture(scope="session")
def model() -> Step3p5ForCausalLM:
    return load_model(MICRO, dtype="float32", progress=False)


@pytest.fixture(scope="session")
def golden() -> tuple[list[int], list[int]]:
    """160 prompt tokens and the 96 greedy ones that transformers 5.23 continues with in fp32."""
    stored = np.load(MICRO / "transformers-logits-f32.npz")
    ids, length = stored["ids"].tolist(), int(stored["prompt_len"])
    return ids[:length], ids[length:]


@pytest.fixture
def new_core(model: Step3p5ForCausalLM) -> Callable[..., EngineCore]:
    def build(**options: object) -> EngineCore:
        options.setdefault("max_num_seqs", 8)
        options.setdefault("max_num_batched_tokens", 64)
        options.setdefault("max_model_len", 512)
        options.setdefault("kv_cache_bytes", 32 << 20)
        options.setdefault("block_size", 8)
        return EngineCore(model, EngineConfig(**options))  # type: ignore[arg-type]

    return build


def next_spans(
    core: EngineCore, sequences: Seq[SequenceBlocks], done: list[int], lengths: Seq[int], rng: random.Random
) -> list[Span]:
    """So many random tokens more for each sequence, of which `done` are in the cache; room for drafts behind them."""
    spans = []
    for i, (blocks, length) in enumerate(zip(sequences, lengths, strict=True)):
        for group in (0, 1):
            core.cache.grow(blocks, group, done[i] + length + 7)
        spans.append(Span(blocks, done[i], [rng.randrange(512) for _ in range(length)]))
        done[i] += length
    return spans


def request(name: str, prompt: list[int], **options: object) -> Request:
    own = {k: options.pop(k) for k in list(options) if k in Request.__dataclass_fields__}
    options.setdefault("temperature", 0.0)
    options.setdefault("ignore_eos", True)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**options),  # type: ignore[arg-type]
        **own,  # type: ignore[arg-type]
    )


def drive(core: EngineCore, *requests: Request, max_steps: int = 5000) -> dict[str, Finished]:
    """Run requests to their ends, checking the block accounting on the way."""
    finished = {r.request_id: Finished() for r in requests}
    for r in requests:
        core.add(r)
    for _ in range(max_steps):
        if not core.has_work:
            break
        collect(finished, core.step())
    assert not core.has_work, "requests did not end"
    core.check_integrity()
    return finished


def collect(finished: dict[str, Finished], outputs: list[Output]) -> None:
    for output in outputs:
        entry = finished.setdefault(output.request_id, Finished())
        assert not entry.outputs or entry.last.finish_reason is None, "news after the last output"
        entry.outputs.append(output)
        entry.token_ids += output.token_ids
