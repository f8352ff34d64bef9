"""What the engine benchmarks measure: decode, prefill and speculation through `LLM`, and the bytes behind them.

Every rate is over one `LLM.generate` call, engine included; a figure is the median of several after a warm-up.
The ceiling of decode is the bytes of packed weights and cache that a step has to read, over the memory bandwidth
measured in the same run. Prompts are random token ids from a fixed seed, except where acceptance matters.
"""

from __future__ import annotations

import random
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepflash.engine.request import SamplingParams
from stepflash.errors import ConfigError

if TYPE_CHECKING:
    from stepflash.engine.llm import LLM, RequestOutput
    from stepflash.model.transformer import Step3p5ForCausalLM

SHORT_CONTEXT = 16
# Which expert weights exist, packed or not; each token reads top_k of them.
EXPERT_NAMES = (".feed_forward.experts.", ".moe.gate_proj", ".moe.up_proj", ".moe.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Tokens per second of the counted runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


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

    `acceptance[k]`: of the drafts of module k + 1 that were verified, how many were right.
    """

    draft_depth: int | None
    rates: Samples
    acceptance: tuple[float, ...]
    tokens_per_step: float


def random_prompts(vocab_size: int, num_tokens: int, streams: int, seed: int = 0) -> list[list[int]]:
    """`streams` different prompts of `num_tokens` ids."""
    rng = random.Random(f"{seed}/{num_tokens}/{streams}")
    return [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(streams)]


def decode_rates(llm: LLM, context: int, num_generated: int, streams: int, runs: int) -> Samples:
    """Tokens per second of all streams together while they decode after `context` tokens, without drafts.

    The time is that of the slowest stream from its first token to its last. The warm-up fills the prefix cache,
    so that in the counted runs no long prefill of one stream holds up the decoding of another.
    """
    sampling = SamplingParams(max_tokens=num_generated, temperature=0.0, ignore_eos=True, draft_depth=0)
    prompts = random_prompts(_vocab_limit(llm), context, streams)
    rates = []
    for _ in range(runs + 1):
        outputs = _generate(llm, prompts, sampling)
        seconds = max(output.stats.decode_seconds for output in outputs)
        rates.append(sum(len(output.token_ids) - 1 for output in outputs) / seconds)
    return Samples(values=tuple(rates[1:]))


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
        )
        for depth in depths
    ]
    return found, is_identical


def step_bytes(model: Step3p5ForCausalLM, context: int, streams: int, kv_itemsize: int) -> StepBytes:
    """What one decode step of the trunk reads: dense weights, the experts that the batch meets, head, and cache.

    Of E experts, B tokens that choose k each meet E (1 - (1 - k/E)^B) if they choose independently: k for one.
    """
    config = model.config
    met = 0.0
    if config.num_experts:
        met = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** streams
    # The MTP modules follow the trunk's layers and are not run; the embedding is a lookup of a row per token.
    skipped = (
        "model.embed_tokens.",
        *(f"model.layers.{i}." for i in range(config.num_layers, len(config.layers))),
    )
    weights = float(streams * config.hidden_size * model.model.embed_tokens.weight.element_size())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(skipped):
            weights += tensor.nbytes * (met if any(part in name for part in EXPERT_NAMES) else 1)
    kv = sum(
        2 * layer.num_kv_heads * layer.head_dim * kv_itemsize * min(context, layer.window or context)
        for layer in config.trunk_layers
    )
    return StepBytes(weights=weights, kv=streams * kv)


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
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


def _acceptance(outputs: Sequence[RequestOutput]) -> tuple[float, ...]:
    drafted = [sum(column) for column in zip(*(o.stats.num_drafted_tokens for o in outputs), strict=True)]
    accepted = [sum(column) for column in zip(*(o.stats.num_accepted_tokens for o in outputs), strict=True)]
    return tuple(right / tried for right, tried in zip(accepted, drafted, strict=True) if tried)
