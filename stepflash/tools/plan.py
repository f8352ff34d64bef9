"""What fits on a machine, how fast it can be at most, and how it may be split: from a configuration alone.

Memory is weights by format, plus keys and values by context and streams; speed is bounded by the bytes that a
step must read. A plan that does not work is refused with the limiting quantity and its numbers, never with a
bare no. Ceilings are not predictions: real engines reach a part of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from stepflash.errors import ConfigError
from stepflash.model import cost
from stepflash.model.config import DTYPE_BYTES, LayerConfig, ModelConfig
from stepflash.tools.decode_cost import expected_tokens
from stepflash.tools.hardware import Machine, show_bytes
from stepflash.tools.weight_formats import FORMATS, WeightFormat, sizes, weight_bytes_read, without_mtp

SPLITS = ("tensor", "expert", "layers")


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


def kv_cache_bytes(config: ModelConfig, request: Request, context: int | None = None) -> int:
    """Keys and values of all streams: what grows with the context, and full windows of the sliding layers."""
    tokens = request.context if context is None else context
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
        "layers": ["devices take turns: a stream sees the bandwidth of one"],
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


def make_plan(config: ModelConfig, model: str, machine: Machine, fmt: WeightFormat, request: Request) -> Plan:
    """One format on one machine: fit, limits, split and ceilings."""
    if not request.with_mtp:
        config = without_mtp(config)
    stored = sizes(config, fmt)
    split = _choose_split(config, fmt, machine.count, request.split)
    kv_share = _kv_share(config, split)
    weights = (stored.trunk + stored.mtp) / machine.count
    kv = kv_cache_bytes(config, request)
    available = machine.usable_bytes
    room = max(0.0, available - weights) / kv_share
    fixed = kv_cache_bytes(config, request, context=0)
    per_token = kv_cache_bytes(config, request, context=1) - fixed
    longest = int((room - fixed) / per_token) if per_token and room > fixed else 0
    max_streams = int(room / (kv / request.streams))
    limit = _find_limit(config, machine, request, split, weights, kv * kv_share)
    if limit is not None and limit.quantity == "kv_cache":
        limit = replace(limit, reason=f"{limit.reason}; {_remedies(request, limit, longest, max_streams)}")
    return Plan(
        model=model,
        machine=machine.name,
        format=fmt.name,
        fits=limit is None,
        limit=limit,
        weight_bytes=stored.trunk,
        mtp_bytes=stored.mtp,
        kv_bytes=kv,
        device_bytes=weights + kv * kv_share,
        device_available_bytes=available,
        max_context=min(longest, config.max_position_embeddings),
        max_streams=max_streams,
        split=split,
        ceilings=_ceilings(config, machine, fmt, request, split) if limit is None else (),
    )


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


def _kv_share(config: ModelConfig, split: Split) -> float:
    """Part of the cache that each device holds."""
    if split.kind == "layers":
        return 1 / split.count
    return 1 / min(split.count, min(layer.num_kv_heads for layer in config.layers))


def _find_limit(
    config: ModelConfig, machine: Machine, request: Request, split: Split, weights: float, kv: float
) -> Limit | None:
    available = machine.usable_bytes
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
    if weights + kv > available:
        reason = (
            f"keys and values {show_bytes(kv)} for {request.streams} x {request.context:,} tokens"
            f" > {show_bytes(available - weights)} left beside weights {show_bytes(weights)} of {memory}"
        )
        return Limit(quantity="kv_cache", needed=kv, available=available - weights, reason=reason)
    return None


def _remedies(request: Request, limit: Limit, longest: int, max_streams: int) -> str:
    """What would fit instead of a cache that does not."""
    options = [f"{request.streams} x {longest:,} tokens"] if longest else []
    if max_streams:
        options.append(f"{max_streams} x {request.context:,} tokens")
    if DTYPE_BYTES[request.kv_dtype] == 2 and limit.needed / 2 <= limit.available:
        options.append("8-bit keys and values")
    return (" or ".join(options) or "nothing") + " would fit"


def _ceilings(
    config: ModelConfig, machine: Machine, fmt: WeightFormat, request: Request, split: Split
) -> tuple[Ceiling, ...]:
    """One for each number of drafts; empty if the bandwidth is not known."""
    if machine.bandwidth is None:
        return ()
    # In a split by layers the devices take turns.
    working = 1 if split.kind == "layers" else machine.count
    return tuple(
        step_ceiling(config, fmt, request, depth, machine.bandwidth * working, machine.bf16_rate, working)
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
) -> Ceiling:
    """Upper bound from bytes read at `bandwidth` and, if known, from operations at `rate` a device."""
    num_tokens = request.streams * (1 + num_drafts)
    num_bytes = weight_bytes_read(config, fmt, num_tokens, num_drafts) + kv_bytes_read(
        config, request, num_drafts
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
