"""What the prefix cache costs those who do not profit from it: `python benchmarks/prefix_cache.py [MODEL]`.

Two comparisons, each of which takes turns; medians, and their ratio:

- modules: a request with `draft_depth` 0, alone, in an engine with prediction modules, which must not run for it,
  against an engine without them: seconds for a prompt and for an answer;
- saving: tokens a second of a load without a pause, each request with a prompt of its own, while the cache is saved
  to a file and while it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.llm import LLM
from stepflash.engine.request import Request, SamplingParams
from stepflash.model.transformer import Step3p5ForCausalLM

PROMPT, ANSWER = 1024, 256
STREAMS, ROUND_SECONDS = 8, 1.25


def prompt(chance: torch.Generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(10, 2000, (length,), generator=chance).tolist())


def alone(core: EngineCore, token_ids: Sequence[int]) -> tuple[float, float]:
    """Seconds for the prompt and for the answer of one request without drafts."""
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True, draft_depth=0)
    core.add(Request(request_id="a", prompt_token_ids=tuple(token_ids), sampling=sampling))
    start = time.perf_counter()
    first = 0.0
    while core.has_work:
        if core.step() and not first:
            first = time.perf_counter()
    return first - start, time.perf_counter() - first


def modules(model: Step3p5ForCausalLM, runs: int) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(0)
    cores = [EngineCore(model, EngineConfig(max_model_len=2048, max_draft_depth=d)) for d in (3, 0)]
    seconds: list[list[tuple[float, float]]] = [[], []]
    for _ in range(runs + 1):
        token_ids = prompt(chance, PROMPT)
        for core, found in zip(cores, seconds, strict=True):
            found.append(alone(core, token_ids))
    (prefill, decode), (prefill_0, decode_0) = (
        [statistics.median(column) for column in zip(*found[1:], strict=True)] for found in seconds
    )
    return {
        "prompt_seconds": [prefill, prefill_0],
        "answer_seconds": [decode, decode_0],
        "prompt_ratio": prefill / prefill_0,
        "answer_ratio": decode / decode_0,
    }


def load(core: EngineCore, chance: torch.Generator) -> float:
    """Generated tokens a second of some time without a pause."""
    before, start = core.stats(), time.perf_counter()
    while time.perf_counter() - start < ROUND_SECONDS:
        while len(core.scheduler.running) + len(core.scheduler.waiting) < STREAMS:
            sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
            name = str(torch.randint(1 << 60, (), generator=chance).item())
            core.add(Request(request_id=name, prompt_token_ids=prompt(chance, 64), sampling=sampling))
        core.step()
    seconds = time.perf_counter() - start
    if core.saver is not None:
        core.saver.settle()  # or it would be written in the turn of the other
    return (core.stats().num_generated_tokens - before.num_generated_tokens) / seconds


def saving(model: Step3p5ForCausalLM, runs: int, file: Path) -> dict[str, Any]:
    """One engine, whose saver is taken away every other time."""
    config = EngineConfig(max_model_len=2048, kv_cache_bytes=512 << 20, prefix_cache_path=file)
    core = EngineCore(model, config)
    saver, chance = core.saver, torch.Generator().manual_seed(1)
    rates: list[list[float]] = [[], []]
    load(core, chance)
    for _ in range(runs):
        for core.saver, found in ((saver, rates[0]), (None, rates[1])):
            found.append(load(core, chance))
    saved, plain = map(statistics.median, rates)
    return {
        "tokens_per_second": [saved, plain],
        "ratio": saved / plain,
        "ratios": sorted(a / b for a, b in zip(*rates, strict=True)),
        "file_bytes": file.stat().st_size,
        "cached_bytes": core.stats().kv_cached_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", choices=("modules", "saving"))
    options = parser.parse_args()
    model = LLM(options.model, prefix_caching=False).model
    found = {}
    if options.only != "saving":
        found["modules"] = modules(model, options.runs)
    if options.only != "modules":
        with tempfile.TemporaryDirectory() as folder:
            found["saving"] = saving(model, options.runs, Path(folder) / "cache")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
