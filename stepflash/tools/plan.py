"""What fits on a machine, how fast it can be at most, and how it may be split: from a configuration alone.

Memory is weights by format, plus keys and values by context and streams; speed is bounded by the bytes that a
step must read. A plan that does not work is refused with the limiting quantity and its numbers, never with a
bare no. Ceilings are not predictions: real engines reach a part of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stepflash.errors import ConfigError
from stepflash.model import cost
from stepflash.model.config import DTYPE_BYTES, LayerConfig, ModelConfig
from stepflash.tools.decode_cost import expected_tokens
from stepflash.tools.hardware import GB, Machine, show_bytes
from stepflash.tools.weight_formats import FORMATS, WeightFormat, sizes, weight_bytes_read, without_mtp

SPLITS = ("tensor", "expert", "layers")
SPLIT_COUNTS = (2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of the machine: `streams` sequences of `context` tokens at the same time."""

    context: int = 32768
    streams: int = 1
    kv_dtype: str = "bfloat16"
    acceptance: float = 0.85
    with_mtp: bool = True
    split: str = "auto"

    def __post_init__(self) -> None:
        if self.context < 1 or self.streams < 1:
            raise ConfigError(
                f"context and streams must be at least 1, got {self.context} and {self.streams}"
            )
        if self.kv_dtype not in DTYPE_BYTES:
            raise ConfigError(f"kv_dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.kv_dtype!r}")
        if not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance must be between 0 and 1, got {self.acceptance}")
        if self.split != "auto" and self.split not in SPLITS:
            raise ConfigError(f"split must be auto, {', '.join(SPLITS)}, got {self.split!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Why a plan is refused: what is needed of `quantity`, and what there is."""

    quantity: str
    needed: float
    available: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One way to divide the model over `count` devices; `reasons` say why not, or what it costs."""

    count: int
    kind: str
    is_legal: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Upper bounds of decoding with `num_drafts` drafts a step."""

    num_drafts: int
    tokens_per_step: float
    bytes_per_step: float
    bound: str
    tokens_per_second: float
    tokens_per_second_per_stream: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One format on one machine. Bytes are of the whole model unless the name says device."""

    model: str
    machine: str
    format: str
    fits: bool
    limit: Limit | None
    weight_bytes: float
    mtp_bytes: float
    kv_bytes: float
    device_bytes: float
    device_available_bytes: float
    max_context: int
    max_streams: int
    split: Split
    ceilings: tuple[Ceiling, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def kv_cache_bytes(
    config: ModelConfig,
    request: Request,
    context: int | None = None,
    layers: Sequence[LayerConfig] | None = None,
) -> int:
    """Keys and values of all streams: what grows with the context, and full windows of the sliding layers.

    Args:
        context: instead of the request's.
        layers: only of these.
    """
    tokens = request.context if context is None else context
    if layers is None:
        layers = config.layers if request.with_mtp else config.trunk_layers
    positions = ((layer, tokens if layer.window is None else layer.window) for layer in layers)
    return request.streams * sum(count * _position_bytes(layer, request) for layer, count in positions)


def _position_bytes(layer: LayerConfig, request: Request) -> int:
    """Keys and values of one position; int8 ones have a float32 scale for each head."""
    scales = 2 * 4 * layer.num_kv_heads if request.kv_dtype == "int8" else 0
    return cost.kv_bytes_per_position(layer, DTYPE_BYTES[request.kv_dtype]) + scales


def splits(config: ModelConfig, fmt: WeightFormat, count: int) -> tuple[Split, ...]:
    """Every way to divide the model over `count` devices, legal or not, with the reasons."""
    if count == 1:
        return (Split(count=1, kind="none", is_legal=True, reasons=()),)
    attention = _attention_obstacles(config, count)
    obstacles = {
        "tensor": attention + _tensor_expert_obstacles(config, fmt, count),
        "expert": attention + _expert_obstacles(config, count),
        "layers": [],
    }
    remarks = {
        "tensor": _replication(config, count),
        "expert": [f"{config.num_experts // count} experts on each device", *_replication(config, count)],
        "layers": ["whole layers, devices take turns: a stream sees the bandwidth of one"],
    }
    if count > config.num_layers:
        obstacles["layers"].append(f"{config.num_layers} layers are fewer than {count} devices")
    return tuple(
        Split(
            count=count,
            kind=kind,
            is_legal=not obstacles[kind],
            reasons=tuple(obstacles[kind] or remarks[kind]),
        )
        for kind in SPLITS
    )


def _attention_obstacles(config: ModelConfig, count: int) -> list[str]:
    found = []
    for heads in sorted({layer.num_heads for layer in config.layers}):
        if heads % count:
            found.append(f"{heads} query heads do not divide by {count}")
    for heads in sorted({layer.num_kv_heads for layer in config.layers}):
        if heads % count and count % heads:
            found.append(f"{heads} key-value heads neither divide by {count} nor repeat evenly")
    if any(not layer.is_moe for layer in config.layers) and config.intermediate_size % count:
        found.append(f"{config.intermediate_size} columns of the dense layers do not divide by {count}")
    return found


def _replication(config: ModelConfig, count: int) -> list[str]:
    heads = min(layer.num_kv_heads for layer in config.layers)
    if count <= heads:
        return []
    return [f"{heads} key-value heads: each is stored on {count // heads} devices"]


def _tensor_expert_obstacles(config: ModelConfig, fmt: WeightFormat, count: int) -> list[str]:
    width = config.moe_intermediate_size
    if width % count:
        return [f"{width} expert columns do not divide by {count}"]
    part = width // count
    if part % fmt.block:
        shape = f"{fmt.block} x {fmt.block} block" if fmt.is_square else f"group of {fmt.block}"
        return [f"{width} expert columns / {count} = {part}, not a multiple of the {shape} of {fmt.name}"]
    return []


def _expert_obstacles(config: ModelConfig, count: int) -> list[str]:
    if config.num_experts % count:
        return [f"{config.num_experts} experts do not divide by {count}"]
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What a device holds: weights, and `kv_share` of the keys and values of some layers."""

    weights: float
    layers: tuple[LayerConfig, ...]
    kv_share: float

    def kv_bytes(self, config: ModelConfig, request: Request, context: int | None = None) -> float:
        return self.kv_share * kv_cache_bytes(config, request, context, self.layers)

    def longest(self, config: ModelConfig, request: Request, room: float) -> int:
        """The context for which `room` is enough."""
        fixed = self.kv_bytes(config, request, 0)
        per_token = self.kv_bytes(config, request, 1) - fixed
        if room < fixed:
            return 0
        return int((room - fixed) / per_token) if per_token else config.max_position_embeddings


def make_plan(config: ModelConfig, model: str, machine: Machine, fmt: WeightFormat, request: Request) -> Plan:
    """One format on one machine: fit, limits, split and ceilings."""
    if not request.with_mtp:
        config = without_mtp(config)
    stored = sizes(config, fmt)
    split = _choose_split(config, fmt, machine.count, request.split)
    shares = _shares(config, fmt, split)
    available = machine.usable_bytes
    rooms = [max(0.0, available - share.weights) for share in shares]
    needs = [share.kv_bytes(config, request) for share in shares]
    longest = min(share.longest(config, request, room) for share, room in zip(shares, rooms, strict=True))
    max_streams = min(
        int(room / (need / request.streams)) for room, need in zip(rooms, needs, strict=True) if need
    )
    limit = _find_limit(config, machine, request, split, shares)
    if limit is not None:
        remedies = _remedies(config, machine, fmt, request, limit, longest, max_streams)
        limit = replace(limit, reason=limit.reason + remedies)
    return Plan(
        model=model,
        machine=machine.name,
        format=fmt.name,
        fits=limit is None,
        limit=limit,
        weight_bytes=stored.trunk,
        mtp_bytes=stored.mtp,
        kv_bytes=kv_cache_bytes(config, request),
        device_bytes=max(share.weights + need for share, need in zip(shares, needs, strict=True)),
        device_available_bytes=available,
        max_context=min(longest, config.max_position_embeddings),
        max_streams=max_streams,
        split=split,
        ceilings=_ceilings(config, machine, fmt, request, split) if limit is None else (),
    )


def _shares(config: ModelConfig, fmt: WeightFormat, split: Split) -> list[_Share]:
    """What the devices hold: one entry if it is the same for all, else one for each."""
    stored = sizes(config, fmt)
    if split.kind != "layers":
        share = 1 / min(split.count, min(layer.num_kv_heads for layer in config.layers))
        weights = (stored.trunk + stored.mtp) / split.count
        return [_Share(weights=weights, layers=config.layers, kv_share=share)]
    # Whole layers one after the other, prediction modules last, as llama.cpp does it: not all devices get as many.
    by_layer = [*stored.layers, *stored.mtp_modules]
    by_layer[0] += stored.embedding
    by_layer[-1] += stored.after_layers
    bounds = [len(by_layer) * i // split.count for i in range(split.count + 1)]
    return [
        _Share(weights=sum(by_layer[first:end]), layers=config.layers[first:end], kv_share=1.0)
        for first, end in itertools.pairwise(bounds)
    ]


def _choose_split(config: ModelConfig, fmt: WeightFormat, count: int, wanted: str) -> Split:
    """The wanted split, or the first legal one; GGUF engines split by layers."""
    options = splits(config, fmt, count)
    if count == 1:
        return options[0]
    if wanted != "auto":
        return next(option for option in options if option.kind == wanted)
    if "vllm" not in fmt.engines:
        return next(option for option in options if option.kind == "layers")
    return next((option for option in options if option.is_legal), options[0])


def _find_limit(
    config: ModelConfig, machine: Machine, request: Request, split: Split, shares: Sequence[_Share]
) -> Limit | None:
    available = machine.usable_bytes
    weights = max(share.weights for share in shares)
    fullest = max(shares, key=lambda share: share.weights + share.kv_bytes(config, request))
    each = f" on each of {machine.count} devices" if machine.count > 1 else ""
    memory = f"{show_bytes(available)} usable of {show_bytes(machine.memory_bytes)}{each}"
    if request.context > config.max_position_embeddings:
        return Limit(
            quantity="context",
            needed=request.context,
            available=config.max_position_embeddings,
            reason=f"context {request.context:,} > {config.max_position_embeddings:,} tokens of the model",
        )
    if not split.is_legal:
        reason = f"{split.kind} split over {split.count} devices: {'; '.join(split.reasons)}"
        return Limit(quantity="split", needed=split.count, available=1, reason=reason)
    if weights > available:
        reason = f"weights {show_bytes(weights)} > {memory}"
        return Limit(quantity="weights", needed=weights, available=available, reason=reason)
    kv, room = fullest.kv_bytes(config, request), available - fullest.weights
    if kv > room:
        reason = (
            f"keys and values {show_bytes(kv)} for {request.streams} x {request.context:,} tokens"
            f" > {show_bytes(room)} left beside weights {show_bytes(fullest.weights)} of {memory}"
        )
        return Limit(quantity="kv_cache", needed=kv, available=room, reason=reason)
    return None


def _remedies(
    config: ModelConfig,
    machine: Machine,
    fmt: WeightFormat,
    request: Request,
    limit: Limit,
    longest: int,
    max_streams: int,
) -> str:
    """What would fit instead, for the end of the reason: less cache, or more memory."""
    options = []
    if limit.quantity == "kv_cache":
        options += [f"{request.streams} x {longest:,} tokens"] if longest else []
        options += [f"{max_streams} x {request.context:,} tokens"] if max_streams else []
        if DTYPE_BYTES[request.kv_dtype] == 2 and limit.needed / 2 <= limit.available:
            options.append("8-bit keys and values")
    if options:
        return f"; {' or '.join(options)} would fit"
    if limit.quantity in ("weights", "kv_cache"):
        return f"; {_enough_memory(config, machine, fmt, request)} would do"
    return ""


def _enough_memory(config: ModelConfig, machine: Machine, fmt: WeightFormat, request: Request) -> str:
    """More devices of the kind where it has several, else the memory that one needs."""
    if machine.kind == "gpu":
        for count in (n for n in SPLIT_COUNTS if n > machine.count):
            shares = _shares(config, fmt, _choose_split(config, fmt, count, request.split))
            if max(s.weights + s.kv_bytes(config, request) for s in shares) <= machine.usable_bytes:
                return f"{count} such GPUs"
    shares = _shares(config, fmt, _choose_split(config, fmt, machine.count, request.split))
    needed = max(share.weights + share.kv_bytes(config, request) for share in shares)
    each = " each" if machine.count > 1 else ""
    return f"{math.ceil(machine.memory_for(needed) / GB):,} GB of memory{each}"


def _ceilings(
    config: ModelConfig, machine: Machine, fmt: WeightFormat, request: Request, split: Split
) -> tuple[Ceiling, ...]:
    """One for each number of drafts; empty if the bandwidth is not known."""
    if machine.bandwidth is None:
        return ()
    # In a split by layers the devices take turns, but each can work for other streams meanwhile.
    in_turn = split.kind == "layers"
    working = 1 if in_turn else machine.count
    groups = min(machine.count, request.streams) if in_turn else 1
    bandwidth = machine.bandwidth * working
    return tuple(
        step_ceiling(config, fmt, request, depth, bandwidth, machine.bf16_rate, working, groups)
        for depth in range(config.num_mtp_layers + 1)
    )


def step_ceiling(
    config: ModelConfig,
    fmt: WeightFormat,
    request: Request,
    num_drafts: int,
    bandwidth: float,
    rate: float | None = None,
    devices: int = 1,
    groups: int = 1,
) -> Ceiling:
    """Upper bound from bytes read at `bandwidth` and, if known, from operations at `rate` a device.

    Args:
        groups: the streams are as many groups, whose steps overlap in a pipeline; bytes are those of one.
    """
    num_tokens = request.streams * (1 + num_drafts) / groups
    num_bytes = (
        weight_bytes_read(config, fmt, num_tokens, num_drafts)
        + kv_bytes_read(config, request, num_drafts) / groups
    )
    seconds, bound = num_bytes / bandwidth, "bandwidth"
    if rate is not None:
        compute = num_tokens * cost.flops_per_token(config, request.context) / (rate * devices)
        if compute > seconds:
            seconds, bound = compute, "compute"
    tokens = expected_tokens(num_drafts, request.acceptance)
    return Ceiling(
        num_drafts=num_drafts,
        tokens_per_step=tokens,
        bytes_per_step=num_bytes,
        bound=bound,
        tokens_per_second=request.streams * tokens / seconds,
        tokens_per_second_per_stream=tokens / seconds,
    )


def kv_bytes_read(config: ModelConfig, request: Request, num_drafts: int) -> int:
    """Keys and values that a step reads: each layer's visible ones, once for all verified tokens of a stream."""
    layers = (*config.trunk_layers, *config.mtp_layers[:num_drafts])
    return request.streams * sum(
        _position_bytes(layer, request) * min(request.context, layer.window or request.context)
        for layer in layers
    )


def plans(
    config: ModelConfig, model: str, machine: Machine, request: Request, format_name: str | None = None
) -> list[Plan]:
    """All formats on one machine, or the named one.

    Raises:
        ConfigError: there is no such format.
    """
    if format_name is not None and format_name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format_name!r}")
    chosen = [FORMATS[format_name]] if format_name else list(FORMATS.values())
    return [make_plan(config, model, machine, fmt, request) for fmt in chosen]


def recommend(machine: Machine, candidates: list[Plan]) -> Plan | None:
    """The best format that fits and that an engine runs well on this kind of machine."""
    # bf16 and fp8 of the released files need vLLM or SGLang to be fast, so GPUs; elsewhere GGUF serves best.
    wanted = {"vllm", "llama.cpp"} if machine.kind == "gpu" else {"llama.cpp"}
    fitting = [plan for plan in candidates if plan.fits]
    suited = [plan for plan in fitting if wanted & set(FORMATS[plan.format].engines)]
    return next(iter(suited or fitting), None)
