"""What a decoded token costs, relative to Step 3.5 Flash: a roofline with a latency target.

A group of GPUs decodes as many sequences as it can while each keeps its promised speed; the cost of a token is
the rent of the group over the tokens that it promises. Per step the weights and the cache are read, or
multiplied, whichever takes longer, plus a fixed latency for each layer; drafted tokens are verified in the
same step and accepted with a given probability. `CARD` is the table of the model card that this explains.

Hardware and sizes come from datasheets and configurations. The assumptions marked as fitted in `SOURCES` were
chosen looking at the card's five ratios, so agreement with them is in-sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stepflash.errors import ConfigError
from stepflash.tools import architectures
from stepflash.tools.architectures import Architecture, Layer
from stepflash.tools.hardware import CHIPS, Chip
from stepflash.tools.weight_formats import touched_fraction

CONTEXT = 131072
NETWORK = 50e9  # bytes a second and GPU between nodes: one 400 Gbit/s port each
GPUS_PER_NODE = 8
FP8_BYTES = 1
COMBINE_BYTES = FP8_BYTES + 2  # all-to-all of one value: FP8 to the expert, BF16 back


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How the card says that a model is served: `speed` tokens a second for each user, on a group of GPUs."""

    speed: float
    num_drafts: int
    num_gpus: int

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise ConfigError(f"speed must be positive, got {self.speed:g}")
        if not 0 <= self.num_drafts <= 16:
            raise ConfigError(f"drafts must be between 0 and 16, got {self.num_drafts}")
        if self.num_gpus < 1:
            raise ConfigError(f"gpus must be at least 1, got {self.num_gpus}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardEntry:
    """A model as the card serves it; `ratio` is None for a model that is not on the card."""

    model: Architecture
    serving: Serving
    ratio: float | None


def card() -> tuple[CardEntry, ...]:
    """The row `Est. decoding cost (@ 128K context, Hopper GPU)` of the model card."""
    node = Serving(speed=100.0, num_drafts=3, num_gpus=8)
    rows = (
        (architectures.step_3_5_flash(), node, 1.0),
        (
            architectures.deepseek_v3(2048, "DeepSeek V3.2"),
            Serving(speed=33.0, num_drafts=1, num_gpus=32),
            6.0,
        ),
        (architectures.kimi_k2(), Serving(speed=33.0, num_drafts=0, num_gpus=32), 18.9),
        (architectures.glm_4_7(), node, 18.9),
        (architectures.minimax_m2_1(), node, 3.9),
        (architectures.mimo_v2_flash(), node, 1.2),
    )
    return tuple(CardEntry(model=model, serving=serving, ratio=ratio) for model, serving, ratio in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Everything that is assumed about the serving system; one set for all models."""

    chip: Chip = CHIPS["H20"]
    context: int = CONTEXT
    acceptance: float = 0.85
    layer_latency_us: float = 100.0
    efficiency: float = 1.0
    weight_bits: float = 8.0
    kv_bytes: int = 1
    attention_math: str = "bf16"
    overlap: bool = True
    memory_fraction: float = 0.9
    memory_reserve_gb: float = 2.0
    imbalance: float = 1.0
    whole_sequences: bool = True
    tensor_parallel_attention: bool = True
    bill_promised_speed: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance must be between 0 and 1, got {self.acceptance}")
        if self.context < 1:
            raise ConfigError(f"context must be at least 1, got {self.context}")
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"efficiency must be above 0 and at most 1, got {self.efficiency:g}")
        if not self.layer_latency_us >= 0:
            raise ConfigError(f"the latency of a layer must be 0 or more, got {self.layer_latency_us:g} us")
        if not self.imbalance >= 1:
            raise ConfigError(f"imbalance must be at least 1, got {self.imbalance:g}")


# Where each assumption comes from. "fitted": chosen among several while looking at the card's ratios.
SOURCES = {
    "chip": "fitted (the card says Hopper; among H20, H100, H800, H200 only H20 explains all five); its numbers "
    "are the datasheet's",
    "context": "the card",
    "acceptance": "fitted: chance that a draft is accepted given that all before it were",
    "layer_latency_us": "fitted: launches, synchronisation and collectives, for each layer",
    "efficiency": "fitted: share of the datasheet's peaks that is reached, 1 is all",
    "weight_bits": "assumed: FP8 for all weights of all models",
    "kv_bytes": "assumed: FP8 keys and values, as in arXiv 2507.19427",
    "attention_math": "fitted: attention is multiplied in BF16, although its cache is FP8",
    "overlap": "assumed: reading and multiplying overlap fully",
    "memory_fraction": "assumed: usable share of the memory",
    "memory_reserve_gb": "assumed: activations",
    "imbalance": "assumed: load of the busiest GPU's experts over the mean",
    "whole_sequences": "assumed: no sequence is split over groups of GPUs that share its attention",
    "tensor_parallel_attention": "assumed up to 8 GPUs (the report: 8 KV heads were chosen for it)",
    "bill_promised_speed": "fitted: a group sells its promised speed, not what it could reach",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One model under one set of assumptions; `batch` 0 means that it cannot keep the promised speed at all."""

    model: str
    batch: float
    limit: str
    tokens_per_step: float
    step_ms: dict[str, float]
    gpu_seconds_per_token: float

    def dollars_per_million(self, chip: Chip) -> float | None:
        """At the rent of `chip`; checked by nothing but arithmetic."""
        if chip.dollars_per_hour is None or math.isinf(self.gpu_seconds_per_token):
            return None
        return self.gpu_seconds_per_token * chip.dollars_per_hour / 3600 * 1e6


def expected_tokens(num_drafts: int, acceptance: float) -> float:
    """Tokens that a step yields on average: one, and each draft if all before it were accepted."""
    return math.fsum(math.pow(acceptance, depth) for depth in range(num_drafts + 1))


def estimate(model: Architecture, serving: Serving, assumptions: Assumptions) -> Estimate:
    """The largest batch that memory and promised speed allow, and the cost of a token in it.

    Raises:
        ConfigError: drafts are wanted of a model without prediction modules.
    """
    if serving.num_drafts and model.draft is None:
        raise ConfigError(f"{model.name} has no prediction module to draft with; set the drafts to 0")
    tokens = expected_tokens(serving.num_drafts, assumptions.acceptance)
    deadline = tokens / serving.speed
    unit = 1 if _attention_gpus(serving, assumptions) > 1 else serving.num_gpus
    room = _memory_batch(model, serving, assumptions)

    def fits(batch: float) -> bool:
        return batch <= room and sum(step_seconds(model, serving, assumptions, batch).values()) <= deadline

    if assumptions.whole_sequences:
        batch = float(unit * _largest(lambda count: fits(count * unit)))
    else:
        batch = _largest(lambda count: fits(count / 1024)) / 1024
    seconds = step_seconds(model, serving, assumptions, batch) if batch else {}
    limit = "memory" if batch + (unit if assumptions.whole_sequences else 1e-3) > room else "time"
    speed = serving.speed
    if not assumptions.bill_promised_speed and batch:
        speed = tokens / sum(seconds.values())
    return Estimate(
        model=model.name,
        batch=batch,
        limit=limit,
        tokens_per_step=tokens,
        step_ms={part: 1e3 * value for part, value in seconds.items()},
        gpu_seconds_per_token=serving.num_gpus / (batch * speed) if batch else math.inf,
    )


def step_seconds(
    model: Architecture, serving: Serving, assumptions: Assumptions, batch: float
) -> dict[str, float]:
    """Time of one step by part: dense weights, routed experts, attention, fixed latency, draft modules."""
    parts = _pass_seconds(model.layers, model.head_parameters, model, serving, assumptions, batch)
    latency = assumptions.layer_latency_us * 1e-6
    parts["latency"] = model.num_layers * latency
    drafts = 0.0
    if serving.num_drafts and model.draft is not None:
        # Each draft runs one module over all verified tokens: its layer, its projection of 2 x hidden, an LM head.
        extra = 2 * model.hidden_size**2 + model.head_parameters
        one = _pass_seconds(((1, model.draft),), extra, model, serving, assumptions, batch)
        drafts = serving.num_drafts * (sum(one.values()) + latency)
    parts["drafts"] = drafts
    return parts


def _pass_seconds(
    layers: Iterable[tuple[int, Layer]],
    extra: int,
    model: Architecture,
    serving: Serving,
    assumptions: Assumptions,
    batch: float,
) -> dict[str, float]:
    """Roofline times of some layers and `extra` dense parameters on each GPU of the group."""
    chip, context, gpus = assumptions.chip, assumptions.context, serving.num_gpus
    shared_by = _attention_gpus(serving, assumptions)
    num_tokens = batch * (1 + serving.num_drafts)
    bandwidth = chip.bandwidth * assumptions.efficiency
    linear_rate = chip.fp8_rate * assumptions.efficiency
    attention_rate = (
        chip.bf16_rate if assumptions.attention_math == "bf16" else chip.fp8_rate
    ) * assumptions.efficiency
    weight_bytes = assumptions.weight_bits / 8

    def roof(num_bytes: float, flops: float, rate: float) -> float:
        times = (num_bytes / bandwidth, flops / rate)
        return max(times) if assumptions.overlap else sum(times)

    dense = float(extra)
    routed_bytes = routed_flops = kv_bytes = attention_flops = exchanged = 0.0
    for count, layer in layers:
        attention = layer.attention
        dense += count * (attention.parameters + layer.dense)
        copies = max(1.0, shared_by / attention.num_kv_heads)
        kv_bytes += count * batch * copies * attention.bytes_read(context, assumptions.kv_bytes) / gpus
        attention_flops += count * num_tokens * attention.flops(context) / gpus
        if layer.num_experts:
            touched = touched_fraction(layer.num_experts, layer.num_experts_per_tok, num_tokens)
            routed_bytes += count * layer.num_experts * layer.expert * touched * weight_bytes / gpus
            picks = num_tokens * layer.num_experts_per_tok / gpus
            routed_flops += count * picks * 2 * layer.expert
            exchanged += count * picks * model.hidden_size * COMBINE_BYTES
    link = chip.link if gpus <= GPUS_PER_NODE else NETWORK
    parts = {
        "dense": roof(dense * weight_bytes / shared_by, 2 * dense * num_tokens / gpus, linear_rate),
        "experts": assumptions.imbalance * roof(routed_bytes, routed_flops, linear_rate),
        "attention": roof(kv_bytes, attention_flops, attention_rate),
    }
    # The exchange of tokens between GPUs hides behind the rest unless it takes longer.
    parts["exchange"] = max(0.0, exchanged / link - sum(parts.values()))
    return parts


def _attention_gpus(serving: Serving, assumptions: Assumptions) -> int:
    """GPUs that share one sequence: all of a node with tensor-parallel attention, else one."""
    return (
        serving.num_gpus if assumptions.tensor_parallel_attention and serving.num_gpus <= GPUS_PER_NODE else 1
    )


def _memory_batch(model: Architecture, serving: Serving, assumptions: Assumptions) -> float:
    """Sequences whose cache fits beside the weights."""
    gpus, shared_by = serving.num_gpus, _attention_gpus(serving, assumptions)
    layers = list(model.layers)
    dense = 2.0 * model.head_parameters
    if serving.num_drafts and model.draft is not None:
        layers.append((model.num_draft_modules, model.draft))
        dense += model.num_draft_modules * (2 * model.hidden_size**2 + model.head_parameters)
    routed = sum(count * layer.num_experts * layer.expert for count, layer in layers)
    dense += sum(count * (layer.attention.parameters + layer.dense) for count, layer in layers)
    weights = (dense / shared_by + routed / gpus) * assumptions.weight_bits / 8
    cache = sum(
        count
        * max(1.0, shared_by / layer.attention.num_kv_heads)
        * layer.attention.bytes_stored(assumptions.context, assumptions.kv_bytes)
        for count, layer in layers
    )
    usable = assumptions.memory_fraction * assumptions.chip.memory_bytes - assumptions.memory_reserve_gb * 1e9
    return max(0.0, (usable - weights) * gpus / cache)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest count with fits(count), which holds up to it and not beyond; 0 if none."""
    if not fits(1):
        return 0
    high = 1
    while fits(high):
        high *= 2
        if high > 2**34:
            raise ConfigError("no limit found: a batch of 2^34 sequences still fits")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def compare(
    entries: Sequence[CardEntry], assumptions: Assumptions, weight_bits: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Estimates of all entries as JSON values, with ratios to the first; `weight_bits` by model name."""
    estimates = [
        estimate(
            entry.model,
            entry.serving,
            replace(
                assumptions, weight_bits=(weight_bits or {}).get(entry.model.name, assumptions.weight_bits)
            ),
        )
        for entry in entries
    ]
    base = estimates[0].gpu_seconds_per_token
    rows = []
    for entry, result in zip(entries, estimates, strict=True):
        known = entry.ratio if assumptions.context == CONTEXT else None  # the card has no other context
        ratio = result.gpu_seconds_per_token / base if math.isfinite(base) and result.batch else None
        rows.append(
            {
                "model": entry.model.name,
                "ratio": ratio,
                "card_ratio": known,
                "error": ratio / known - 1 if ratio is not None and known else None,
                **asdict(entry.serving),
                "batch": result.batch,
                "limit": result.limit,
                "tokens_per_step": result.tokens_per_step,
                "step_ms": result.step_ms,
                "dollars_per_million_tokens": result.dollars_per_million(assumptions.chip),
            }
        )
    return rows


def log_error(rows: Sequence[dict[str, Any]]) -> float:
    """Root mean square of log(estimate / card) over the rows after the first; infinite if one cannot be served."""
    pairs = [(row["ratio"], row["card_ratio"]) for row in rows[1:] if row["card_ratio"]]
    if not pairs or any(ratio is None for ratio, _ in pairs):
        return math.inf
    return math.sqrt(sum(math.log(ratio / known) ** 2 for ratio, known in pairs) / len(pairs))
