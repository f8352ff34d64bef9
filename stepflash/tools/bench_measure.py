"""What the engine benchmarks measure: decode, prefill and speculation through `LLM`, and the bytes behind them.

Every rate is over one `LLM.generate` call, engine included; a figure is the median of several after a warm-up.
The ceiling of decode is the bytes of packed weights and cache that a step has to read, over the memory bandwidth
measured in the same run. Prompts are random token ids from a fixed seed, except where acceptance matters.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stepflash.engine.request import SamplingParams
from stepflash.errors import ConfigError
from stepflash.weights.quantized import PackedWeight

if TYPE_CHECKING:
    from stepflash.engine.llm import LLM, RequestOutput
    from stepflash.model.transformer import Step3p5ForCausalLM

# Which expert weights exist, packed or not; each token reads top_k of them.
EXPERT_NAMES = (".feed_forward.experts.", ".moe.gate_proj", ".moe.up_proj", ".moe.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Tokens per second of the counted runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def ratio_to(self, other: Samples) -> float:
        """The median of the ratios of each run, which alternated: a machine whose speed changes does so for both."""
        return statistics.median(a / b for a, b in zip(self.values, other.values, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """What one decode step has to read."""

    weights: float
    kv: int

    @property
    def total(self) -> float:
        return self.weights + self.kv


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Greedy decoding of the same prompts at one draft depth; None adapts.

    `acceptance[k]`: of the drafts of module k + 1 that were verified, how many were right. `steps[d]`: how many
    decode steps verified d drafts.
    """

    draft_depth: int | None
    rates: Samples
    acceptance: tuple[float, ...]
    tokens_per_step: float
    steps: tuple[int, ...]


def random_prompts(vocab_size: int, num_tokens: int, streams: int, seed: int = 0) -> list[list[int]]:
    """`streams` different prompts of `num_tokens` ids."""
    rng = random.Random(f"{seed}/{num_tokens}/{streams}")
    return [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(streams)]


def decode_rates(
    llm: LLM, contexts: Sequence[int], num_generated: int, streams: int, runs: int
) -> list[Samples]:
    """Tokens per second of all streams together while they decode after each of `contexts` tokens, without drafts.

    The time is that of the slowest stream from its first token to its last. Every round measures each context once,
    so that a machine that gets slower does so for all. The warm-up fills the prefix cache: in the counted runs no
    long prefill of one stream holds up the decoding of another.
    """
    sampling = SamplingParams(max_tokens=num_generated, temperature=0.0, ignore_eos=True, draft_depth=0)
    prompts = {context: random_prompts(_vocab_limit(llm), context, streams) for context in contexts}
    rates: dict[int, list[float]] = {context: [] for context in contexts}
    for run in range(runs + 1):
        for context in contexts:
            outputs = _generate(llm, prompts[context], sampling)
            seconds = max(output.stats.decode_seconds for output in outputs)
            if run:
                rates[context].append(sum(len(output.token_ids) - 1 for output in outputs) / seconds)
    return [Samples(values=tuple(rates[context])) for context in contexts]


def prefill_rates(llm: LLM, num_tokens: int, streams: int, runs: int) -> Samples:
    """Prompt tokens per second up to the first generated token; the prompts differ, nothing comes from a cache."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, draft_depth=0)
    rates = []
    for run in range(runs + 1):
        outputs = _generate(llm, random_prompts(_vocab_limit(llm), num_tokens, streams, seed=run), sampling)
        if any(output.stats.num_cached_tokens for output in outputs):
            raise ConfigError("prefill must be measured without the prefix cache; pass prefix_caching=False")
        seconds = max(output.stats.queue_seconds + output.stats.prefill_seconds for output in outputs)
        rates.append(streams * num_tokens / seconds)
    return Samples(values=tuple(rates[1:]))


def speculation_rates(
    llm: LLM, prompts: Sequence[Sequence[int]], depths: Sequence[int | None], num_generated: int, runs: int
) -> tuple[list[Speculation], bool]:
    """The same prompts one after the other at each depth, depths alternating; and whether all answers agree."""
    values: dict[int | None, list[float]] = {depth: [] for depth in depths}
    last: dict[int | None, list[RequestOutput]] = {}
    for run in range(runs + 1):
        for depth in depths:
            sampling = SamplingParams(max_tokens=num_generated, temperature=0.0, draft_depth=depth)
            last[depth] = [_generate(llm, [prompt], sampling)[0] for prompt in prompts]
            num_tokens = sum(len(output.token_ids) - 1 for output in last[depth])
            seconds = sum(output.stats.decode_seconds for output in last[depth])
            if run and seconds > 0:
                values[depth].append(num_tokens / seconds)
    first = [output.token_ids for output in last[depths[0]]]
    is_identical = all([output.token_ids for output in outputs] == first for outputs in last.values())
    if not all(values.values()):
        raise ConfigError("every answer ends with its first token; give other prompts")
    found = [
        Speculation(
            draft_depth=depth,
            rates=Samples(values=tuple(values[depth])),
            acceptance=_acceptance(last[depth]),
            tokens_per_step=sum(len(o.token_ids) for o in last[depth])
            / sum(o.stats.num_steps for o in last[depth]),
            steps=_steps_by_depth(last[depth]),
        )
        for depth in depths
    ]
    return found, is_identical


def step_bytes(
    model: Step3p5ForCausalLM,
    context: int,
    streams: int,
    kv_dtype: torch.dtype = torch.bfloat16,
    num_drafts: int = 0,
) -> StepBytes:
    """What one decode step reads: dense weights, the experts that the batch meets, heads, and cache.

    Of E experts, B tokens that choose k each meet E (1 - (1 - k/E)^B) if they choose independently: k for one.
    With drafts a stream has 1 + `num_drafts` tokens in the trunk, and as many prediction modules run, once each.
    """
    config = model.config
    num_tokens = streams * (1 + num_drafts)
    met = 0.0
    if config.num_experts:
        met = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** num_tokens
    # Modules follow the trunk's layers; those that do not run are not read. The embedding is a lookup of rows.
    skipped = (
        "model.embed_tokens.",
        *(f"model.layers.{i}." for i in range(config.num_layers + num_drafts, len(config.layers))),
    )
    row_bytes = config.hidden_size * model.model.embed_tokens.weight.element_size()
    weights = float((num_tokens + streams * num_drafts) * row_bytes)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(skipped):
            weights += tensor.nbytes * (met if any(part in name for part in EXPERT_NAMES) else 1)
    scale_bytes = 4 if kv_dtype == torch.int8 else 0
    kv = sum(
        2
        * layer.num_kv_heads
        * (layer.head_dim * kv_dtype.itemsize + scale_bytes)
        * min(context, layer.window or context)
        for layer in config.layers[: config.num_layers + num_drafts]
    )
    return StepBytes(weights=weights, kv=streams * kv)


def speculation_bytes_per_token(
    model: Step3p5ForCausalLM, found: Speculation, context: int, kv_dtype: torch.dtype
) -> float:
    """What the decode steps of one stream read, over the tokens that they brought."""
    read = sum(
        count * step_bytes(model, context, 1, kv_dtype, depth).total
        for depth, count in enumerate(found.steps)
    )
    return read / sum(found.steps) / found.tokens_per_step


def measure_gemm(size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of torch's own bfloat16 matrix product, what prefill can be compared with; a median."""
    a, b = torch.randn(2, size, size).bfloat16()
    a @ b
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def weight_formats(model: Step3p5ForCausalLM) -> str:
    """The formats of the packed weights with their share of the bytes, or the dtype of an unpacked network."""
    sizes: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, PackedWeight):
            sizes[module.fmt.name.lower()] += module.num_bytes
    if not sizes:
        return f"{str(model.model.embed_tokens.weight.dtype).removeprefix('torch.')} unpacked"
    total = sum(sizes.values())
    return ", ".join(f"{name} {size / total:.0%}" for name, size in sizes.most_common())


class PeakMemory:
    """The most memory that this process held while it was watched; Linux can forget peaks of what is not to count."""

    def __init__(self) -> None:
        self._peak = 0

    def forget(self) -> None:
        """What follows counts, and what was noted; not what happened since."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def note(self) -> int:
        """Bytes, up to now."""
        self._peak = max(self._peak, self._high_water())
        return self._peak

    def _high_water(self) -> int:
        with contextlib.suppress(OSError, IndexError):
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _generate(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[RequestOutput]:
    outputs = llm.generate(prompts, sampling, progress=False)
    for output in outputs:
        if output.error is not None:
            raise ConfigError(f"a request of the benchmark failed: {output.error}")
    return outputs


def _vocab_limit(llm: LLM) -> int:
    """Ids below it have a token."""
    return llm.core.sampler.vocab_limit


def _steps_by_depth(outputs: Sequence[RequestOutput]) -> tuple[int, ...]:
    """Decode steps that verified 0, 1, ... drafts; a prompt took the first step of each answer."""
    drafted = [sum(column) for column in zip(*(o.stats.num_drafted_tokens for o in outputs), strict=True)]
    at_least = [sum(o.stats.num_steps - 1 for o in outputs), *drafted, 0]
    return tuple(more - fewer for more, fewer in itertools.pairwise(at_least))


def _acceptance(outputs: Sequence[RequestOutput]) -> tuple[float, ...]:
    drafted = [sum(column) for column in zip(*(o.stats.num_drafted_tokens for o in outputs), strict=True)]
    accepted = [sum(column) for column in zip(*(o.stats.num_accepted_tokens for o in outputs), strict=True)]
    return tuple(right / tried for right, tried in zip(accepted, drafted, strict=True) if tried)
