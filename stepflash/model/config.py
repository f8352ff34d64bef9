"""What a Step-3.5 checkpoint says about itself, checked and made explicit.

`ModelConfig` is the one description of a network in stepflash. It is read from a Hugging Face config.json
(with all its historical spellings) or from GGUF metadata, and turned into one `LayerConfig` per layer, so that
no other code looks at lists of 45 or 48, at index arithmetic, or at optional keys. Whatever cannot be run
exactly is refused with the key and the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from stepflash.errors import ConfigError
from stepflash.model import cost

FULL, SLIDING = "full_attention", "sliding_attention"
MODEL_TYPES = ("step3p5", "step3p5_text", "step3p7", "step3p7_text")
DEFAULT_EPS = 1e-5
MAX_LAYERS = 10_000  # a damaged file must not make us build a list of 2^32 layers
DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """llama3 frequency scaling: low frequencies are divided by `factor`, high ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one layer: the first `rotary_dim` dimensions of each head turn."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One decoder layer. `window` None is full attention; else keys p - window + 1 .. p are seen from p.

    A limit of None means no clamp. `swiglu_limit` bounds the routed experts, `shared_swiglu_limit` the shared
    expert or the dense MLP.
    """

    window: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    is_moe: bool
    swiglu_limit: float | None = None
    shared_swiglu_limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole network: `layers` holds the trunk's `num_layers` first, then the MTP modules' `num_mtp_layers`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_mtp_layers: int
    layers: tuple[LayerConfig, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    router_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def trunk_layers(self) -> tuple[LayerConfig, ...]:
        return self.layers[: self.num_layers]

    @property
    def mtp_layers(self) -> tuple[LayerConfig, ...]:
        return self.layers[self.num_layers :]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read the configuration of a checkpoint folder, a config.json or a .gguf file.

        Raises:
            ConfigError: there is none, it is not JSON, or it describes something that stepflash cannot run.
        """
        path = Path(path)
        if path.suffix == ".gguf":
            from stepflash.gguf_file import read_gguf

            return cls.from_gguf(read_gguf(path).metadata)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; a checkpoint folder needs its config.json")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of 5,000 digits
            raise ConfigError(f"{file}: not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from a Hugging Face config.json, a wrapper's `text_config` included.

        Raises:
            ConfigError: naming the key and the reason.
        """
        return _from_hugging_face(raw)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ModelConfig:
        """Build from the metadata of a GGUF file of architecture `step35`.

        The format has no room for the parameters of the rotary scaling. The released ones are assumed
        unless the file carries them under `step35.rope.scaling.*` (files written by stepflash do).

        Raises:
            ConfigError: naming the key and the reason.
        """
        return _from_gguf(metadata)

    def num_parameters(self, trunk: bool = True) -> int:
        """Parameters of the trunk with both embeddings, or of the whole checkpoint with its MTP modules."""
        modules = 0 if trunk else self.num_mtp_layers
        return cost.num_trunk_parameters(self) + sum(
            cost.num_mtp_parameters(self, k) for k in range(1, modules + 1)
        )

    def num_active_parameters(self) -> int:
        """Parameters that the trunk multiplies for one token, LM head included, embedding lookup not."""
        return cost.num_active_parameters(self)

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Bytes of keys and values that each further token of a sequence costs in the full-attention layers."""
        return cost.kv_bytes_per_token(self, DTYPE_BYTES[dtype])

    def kv_bytes_per_sequence(self, dtype: str = "bfloat16", mtp: bool = False) -> int:
        """Bytes of keys and values of the full windows of the trunk's sliding layers, and of the MTP modules'."""
        return cost.kv_bytes_per_sequence(self, DTYPE_BYTES[dtype], mtp=mtp)


def _refuse(key: str, value: object, reason: str) -> NoReturn:
    shown = repr(value)
    raise ConfigError(f"config: {key} = {shown if len(shown) < 80 else shown[:77] + '...'}: {reason}")


def _is_whole(value: object) -> TypeGuard[float]:
    """An integer, also one written as 3.0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0


class _Reader:
    """Typed look-ups in a raw mapping; every refusal names the key."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw = raw
        self.prefix = prefix

    def get(self, key: str, default: Any = None) -> Any:
        return self.raw.get(self.prefix + key, default)

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        key = next((k for k in keys if self.get(k) is not None), keys[0])
        value = self.get(key, default)
        if value is None:
            _refuse(self.prefix + key, None, "missing; it has no safe default")
        if not _is_whole(value):
            _refuse(self.prefix + key, value, "must be an integer")
        if value < minimum:
            _refuse(self.prefix + key, value, f"must be at least {minimum}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(self.prefix + key, value, "must be a number")
        if not 0 < value <= sys.float_info.max:
            _refuse(self.prefix + key, value, "must be positive and finite")
        return float(value)

    def require(self, key: str, expected: object, default: object, reason: str) -> None:
        value = self.get(key, default)
        if value != expected:
            _refuse(self.prefix + key, value, reason)

    def per_layer(self, key: str, num_layers: int, num_mtp_layers: int) -> list[Any] | None:
        """A list for all layers, its MTP part None when the file lists the trunk only; None when absent."""
        value = self.get(key)
        if value is None:
            return None
        if num_layers + num_mtp_layers > MAX_LAYERS:
            _refuse(self.prefix + key, value, f"cannot be that of {num_layers} layers (at most {MAX_LAYERS})")
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [value] * (num_layers + num_mtp_layers)
        if len(value) == num_layers + num_mtp_layers:
            return list(value)
        if len(value) == num_layers:
            return list(value) + [None] * num_mtp_layers
        allowed = f"{num_layers} or {num_layers + num_mtp_layers}" if num_mtp_layers else str(num_layers)
        _refuse(self.prefix + key, value, f"has {len(value)} entries, expected {allowed} (one per layer)")


def _from_hugging_face(raw: Mapping[str, Any]) -> ModelConfig:
    outer = raw
    if isinstance(raw.get("text_config"), Mapping):
        raw = raw["text_config"]
    model_type = raw.get("model_type", outer.get("model_type"))
    if model_type not in MODEL_TYPES:
        _refuse("model_type", model_type, "stepflash runs step3p5 checkpoints only")
    read = _Reader(raw)
    read.require("att_impl_type", "GQA", "GQA", "only GQA attention is supported")
    read.require("use_qk_norm", True, True, "the network always normalises queries and keys")
    read.require("use_head_wise_attn_gate", True, True, "the network always gates attention heads")
    read.require("sink", False, False, "attention sinks are not part of this architecture")
    read.require("zero_centered", True, True, "norm weights must be stored as the distance from 1")
    read.require("moe_router_activation", "sigmoid", "sigmoid", "the router is a sigmoid router")
    read.require("use_moe_router_bias", True, True, "the router always has a selection bias")
    read.require("norm_expert_weight", True, True, "expert weights are always renormalised")
    if raw.get("tie_word_embeddings"):
        _refuse("tie_word_embeddings", True, "the LM head is a matrix of its own")
    rotated = raw.get("use_rope_layers") or ()
    if not isinstance(rotated, Sequence) or not all(rotated):
        _refuse("use_rope_layers", rotated, "layers without rotary embedding are not supported")

    num_layers = read.integer("num_hidden_layers")
    layer_types = raw.get("layer_types")
    listed = len(layer_types) - num_layers if isinstance(layer_types, Sequence) else 0
    num_mtp_layers = read.integer("num_nextn_predict_layers", default=max(listed, 0), minimum=0)
    if num_mtp_layers > 3:
        _refuse("num_nextn_predict_layers", num_mtp_layers, "at most 3 prediction modules are supported")
    types = read.per_layer("layer_types", num_layers, num_mtp_layers)
    if types is None:
        _refuse("layer_types", None, "missing; which layers are sliding must be stated")
    types = [t or SLIDING for t in types]
    for kind in types:
        if kind not in (FULL, SLIDING):
            _refuse("layer_types", kind, f"unknown layer type; known: {FULL}, {SLIDING}")

    moe_layers = _moe_layers(read, num_layers)
    window = read.integer("sliding_window") if SLIDING in types else None
    rope = _rope_per_layer(read, types, num_layers, num_mtp_layers)
    heads = {FULL: _heads(read, {}), SLIDING: _heads(read, {})}
    other = raw.get("attention_other_setting")
    if other:
        if not isinstance(other, Mapping) or other.get("attention_type", SLIDING) not in (FULL, SLIDING):
            _refuse("attention_other_setting", other, "must be an object with a known attention_type")
        heads[other.get("attention_type", SLIDING)] = _heads(read, other)
    routed = _limits(read, "swiglu_limits", num_layers, num_mtp_layers)
    shared = _limits(read, "swiglu_limits_shared", num_layers, num_mtp_layers)

    layers = []
    for i, kind in enumerate(types):
        num_heads, num_kv_heads, head_dim = heads[kind]
        theta, factor, scaling = rope[i]
        layers.append(
            LayerConfig(
                window=window if kind == SLIDING else None,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rope=RopeConfig(theta=theta, rotary_dim=_rotary_dim(head_dim, factor), scaling=scaling),
                is_moe=i in moe_layers,
                swiglu_limit=routed[i],
                shared_swiglu_limit=shared[i],
            )
        )
    any_moe = bool(moe_layers)
    num_experts = read.integer("moe_num_experts", "num_experts") if any_moe else 0
    top_k = read.integer("moe_top_k", "num_experts_per_tok") if any_moe else 0
    if top_k > num_experts:
        _refuse("moe_top_k", top_k, f"is larger than moe_num_experts = {num_experts}")
    eos = raw.get("eos_token_id", outer.get("eos_token_id"))
    return ModelConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_layers=num_layers,
        num_mtp_layers=num_mtp_layers,
        layers=tuple(layers),
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=read.integer("moe_intermediate_size") if any_moe else 0,
        shared_expert_intermediate_size=(
            read.integer("share_expert_dim", "share_expert_dims", "moe_intermediate_size") if any_moe else 0
        ),
        router_scaling_factor=read.number("moe_router_scaling_factor", 1.0),
        rms_norm_eps=read.number("rms_norm_eps", DEFAULT_EPS),
        max_position_embeddings=read.integer("max_position_embeddings", "max_seq_len"),
        bos_token_id=_bos_token_id(raw.get("bos_token_id", outer.get("bos_token_id"))),
        eos_token_ids=_token_ids("eos_token_id", [] if eos is None else eos),
    )


def _token_ids(key: str, value: object) -> tuple[int, ...]:
    """One id or a list of them."""
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not all(_is_whole(token_id) and token_id >= 0 for token_id in ids):
        _refuse(key, value, "must be a token id or a list of them")
    return tuple(int(token_id) for token_id in ids)


def _bos_token_id(value: object) -> int | None:
    return None if value is None else _token_ids("bos_token_id", [value])[0]


def _heads(read: _Reader, other: Mapping[str, Any]) -> tuple[int, int, int]:
    """num_heads, num_kv_heads, head_dim of one attention type; `other` overrides the general keys."""
    merged = _Reader({**read.raw, **{key: value for key, value in other.items() if value is not None}})
    num_heads = merged.integer("num_attention_heads")
    num_kv_heads = merged.integer("num_attention_groups", "num_key_value_heads")
    if num_heads % num_kv_heads:
        _refuse(
            "num_attention_heads", num_heads, f"is not a multiple of num_attention_groups = {num_kv_heads}"
        )
    return num_heads, num_kv_heads, merged.integer("head_dim")


def _rotary_dim(head_dim: int, factor: float) -> int:
    rotary_dim = int(head_dim * factor) if factor <= 1 else 0
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        _refuse("partial_rotary_factors", factor, f"gives {rotary_dim} rotary dimensions of {head_dim}")
    return rotary_dim


def _moe_layers(read: _Reader, num_layers: int) -> frozenset[int]:
    if not read.get("use_moe", True):
        return frozenset()
    value = read.get("moe_layers_enum")
    if value is None:
        _refuse("moe_layers_enum", None, "missing; which layers have experts must be stated")
    try:
        items = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        layers = frozenset(int(item) for item in items)
    except (TypeError, ValueError):
        _refuse("moe_layers_enum", value, "must list layer numbers")
    outside = sorted(i for i in layers if not 0 <= i < num_layers)
    if outside:
        _refuse("moe_layers_enum", outside, f"outside the {num_layers} layers of the trunk")
    return layers


def _limits(read: _Reader, key: str, num_layers: int, num_mtp_layers: int) -> list[float | None]:
    values = read.per_layer(key, num_layers, num_mtp_layers)
    if values is None:
        return [None] * (num_layers + num_mtp_layers)
    for value in values:
        if value is not None and (not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max):
            _refuse(key, value, "a clamp must be a number of 0 (off) or more, or null (off)")
    return [float(value) if value else None for value in values]


def _scaling(raw: Any) -> RopeScaling | None:
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        _refuse("rope_scaling", raw, "must be an object or null")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        _refuse("rope_scaling.rope_type", kind, "only llama3 frequency scaling is supported")
    read = _Reader(raw)
    scaling = RopeScaling(
        factor=read.number("factor"),
        low_freq_factor=read.number("low_freq_factor"),
        high_freq_factor=read.number("high_freq_factor"),
        original_max_position_embeddings=read.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        _refuse("rope_scaling.high_freq_factor", scaling.high_freq_factor, "must be above low_freq_factor")
    return scaling


def _rope_per_layer(
    read: _Reader, types: Sequence[str], num_layers: int, num_mtp_layers: int
) -> list[tuple[float, float, RopeScaling | None]]:
    """(theta, rotary share of head_dim, scaling) for each layer.

    Newer serialisations hold one object per layer type under `rope_parameters`; the released file holds
    `rope_theta`, `partial_rotary_factors` and `rope_scaling`, the last only for the types in `yarn_only_types`.
    """
    by_type = read.get("rope_parameters")
    if read.get("rope_theta") is None and isinstance(by_type, Mapping):
        result = []
        for kind in types:
            of_kind = by_type.get(kind, by_type)
            if not isinstance(of_kind, Mapping):
                _refuse(f"rope_parameters.{kind}", of_kind, "must be an object")
            part = _Reader(of_kind)
            share = part.number("partial_rotary_factor", 1.0)
            result.append((part.number("rope_theta"), share, _scaling(part.raw)))
        return result
    thetas = read.per_layer("rope_theta", num_layers, num_mtp_layers)
    if thetas is None:
        _refuse("rope_theta", None, "missing; it has no safe default")
    shares = read.per_layer("partial_rotary_factors", num_layers, num_mtp_layers)
    if shares is None:
        shares = [1.0] * len(types)
    scaling = _scaling(read.get("rope_scaling"))
    scaled_types = read.get("yarn_only_types") or (FULL, SLIDING)
    if not isinstance(scaled_types, Sequence):
        _refuse("yarn_only_types", scaled_types, "must be a list of layer types")
    result = []
    for i, kind in enumerate(types):
        # An MTP entry that the file leaves out takes the value of the trunk's layers of its type.
        twin = next((j for j in range(num_layers) if types[j] == kind), i)
        theta = thetas[i] if thetas[i] is not None else thetas[twin]
        share = shares[i] if shares[i] is not None else shares[twin]
        checked = _Reader({"rope_theta": theta, "partial_rotary_factors": share})
        result.append(
            (
                checked.number("rope_theta"),
                checked.number("partial_rotary_factors"),
                scaling if kind in scaled_types else None,
            )
        )
    return result


# Of the released checkpoint; GGUF does not store them.
RELEASED_ROPE_SCALING = RopeScaling(
    factor=2.0, low_freq_factor=1.0, high_freq_factor=32.0, original_max_position_embeddings=131072
)


def _from_gguf(metadata: Mapping[str, Any]) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "step35":
        _refuse("general.architecture", architecture, "stepflash runs step35 GGUF files only")
    read = _Reader(metadata, "step35.")
    num_mtp_layers = read.integer("nextn_predict_layers", default=0, minimum=0)
    num_layers = read.integer("block_count") - num_mtp_layers
    if num_layers < 1:
        _refuse("step35.block_count", metadata.get("step35.block_count"), "leaves no layer for the trunk")
    sliding = read.per_layer("attention.sliding_window_pattern", num_layers, num_mtp_layers)
    if sliding is None:
        _refuse("step35.attention.sliding_window_pattern", None, "missing; which layers slide must be stated")
    sliding = [True if flag is None else bool(flag) for flag in sliding]
    num_heads = read.per_layer("attention.head_count", num_layers, num_mtp_layers)
    num_kv_heads = read.per_layer("attention.head_count_kv", num_layers, num_mtp_layers)
    if num_heads is None or num_kv_heads is None:
        _refuse("step35.attention.head_count", num_heads, "head_count and head_count_kv are both needed")
    window = read.integer("attention.sliding_window") if any(sliding) else None
    head_dim = read.integer("attention.key_length")
    theta = {False: read.number("rope.freq_base"), True: read.number("rope.freq_base_swa", 10000.0)}
    released = RELEASED_ROPE_SCALING
    scaling = RopeScaling(
        factor=read.number("rope.scaling.factor", released.factor),
        low_freq_factor=read.number("rope.scaling.low_freq_factor", released.low_freq_factor),
        high_freq_factor=read.number("rope.scaling.high_freq_factor", released.high_freq_factor),
        original_max_position_embeddings=read.integer(
            "rope.scaling.original_context_length", default=released.original_max_position_embeddings
        ),
    )
    unscaled = scaling.factor == 1.0
    num_dense = read.integer("leading_dense_block_count", default=0, minimum=0)
    routed = _limits(read, "swiglu_clamp_exp", num_layers, num_mtp_layers)
    shared = _limits(read, "swiglu_clamp_shexp", num_layers, num_mtp_layers)
    if read.get("expert_gating_func", 2) != 2:
        _refuse("step35.expert_gating_func", read.get("expert_gating_func"), "the router is a sigmoid router")
    layers = []
    for i, slides in enumerate(sliding):
        twin = next((j for j in range(num_layers) if sliding[j] == slides), i)
        heads = num_heads[i] if num_heads[i] is not None else num_heads[twin]
        kv_heads = num_kv_heads[i] if num_kv_heads[i] is not None else num_kv_heads[twin]
        if not (_is_whole(heads) and _is_whole(kv_heads) and heads > 0):
            _refuse("step35.attention.head_count", heads, f"and {kv_heads!r} must be numbers of heads")
        heads, kv_heads = int(heads), int(kv_heads)
        if kv_heads < 1 or heads % kv_heads:
            _refuse("step35.attention.head_count", heads, f"is not a multiple of head_count_kv = {kv_heads}")
        layers.append(
            LayerConfig(
                window=window if slides else None,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                # NOTE: the format does not store the rotary width; full layers turn the first half.
                rope=RopeConfig(
                    theta=theta[slides],
                    rotary_dim=head_dim if slides else head_dim // 2,
                    scaling=None if slides or unscaled else scaling,
                ),
                is_moe=num_dense <= i < num_layers,
                swiglu_limit=routed[i],
                shared_swiglu_limit=shared[i],
            )
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    eos_ids = metadata.get("stepflash.eos_token_ids", [] if eos is None else eos)  # ours keep all of them
    return ModelConfig(
        vocab_size=read.integer("vocab_size", default=len(tokens) if isinstance(tokens, list) else None),
        hidden_size=read.integer("embedding_length"),
        intermediate_size=read.integer("feed_forward_length"),
        num_layers=num_layers,
        num_mtp_layers=num_mtp_layers,
        layers=tuple(layers),
        num_experts=read.integer("expert_count"),
        num_experts_per_tok=read.integer("expert_used_count"),
        moe_intermediate_size=read.integer("expert_feed_forward_length"),
        shared_expert_intermediate_size=read.integer(
            "expert_shared_feed_forward_length", "expert_feed_forward_length"
        ),
        router_scaling_factor=_as_written(read.number("expert_weights_scale", 1.0)),
        rms_norm_eps=_as_written(read.number("attention.layer_norm_rms_epsilon", DEFAULT_EPS)),
        max_position_embeddings=read.integer("context_length"),
        bos_token_id=_bos_token_id(metadata.get("tokenizer.ggml.bos_token_id")),
        eos_token_ids=_token_ids("tokenizer.ggml.eos_token_id", eos_ids),
    )


def _as_written(value: float) -> float:
    """1e-05 for the 9.999999747378752e-06 that float32 makes of it: 7 digits survive a float32."""
    return float(f"{value:.7g}")
