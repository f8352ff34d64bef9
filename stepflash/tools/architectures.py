"""Mixture-of-experts models as sizes: what the decode-cost model must know about each, and nothing else.

A model is a few kinds of layers with their counts; a layer is an attention (parameters, operations and bytes
per key) and a feed-forward part (weights that every token meets, and routed experts). Sizes come from the
published configurations; parameter totals derived from them are tested against the published totals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepflash.errors import ConfigError
from stepflash.model import cost
from stepflash.model.config import LayerConfig, ModelConfig

MLA_FP8_OVERHEAD = 80  # bytes a key: the 64 rotary dimensions stay BF16, and four float32 scales
INDEXER_BYTES = 132  # bytes a key of the sparse-attention indexer: 128 FP8 values and a float32 scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention of one layer.

    flops_per_key: for one query token and one attended key, all heads, a multiply-add counted as two.
    attends: a query meets at most so many keys (window or top-k); None is all of them.
    keeps_all: keys beyond `attends` stay in the cache (sparse attention), instead of being dropped (window).
    num_kv_heads: tensor parallelism beyond it stores keys and values more than once.
    """

    parameters: int
    flops_per_key: int
    kv_values_per_key: int
    num_kv_heads: int
    attends: int | None = None
    keeps_all: bool = False
    fp8_overhead_bytes: int = 0
    indexer_flops_per_key: int = 0
    indexer_bytes_per_key: int = 0

    def flops(self, context: int) -> int:
        """Operations of one query token."""
        return self._attended(context) * self.flops_per_key + context * self.indexer_flops_per_key

    def bytes_stored(self, context: int, kv_bytes: int) -> int:
        """Cache of one sequence of `context` tokens."""
        keys = context if self.keeps_all else self._attended(context)
        return keys * self._bytes_per_key(kv_bytes) + context * self.indexer_bytes_per_key

    def bytes_read(self, context: int, kv_bytes: int) -> int:
        """Cache that one decode step of one sequence reads."""
        return self._attended(context) * self._bytes_per_key(kv_bytes) + context * self.indexer_bytes_per_key

    def _attended(self, context: int) -> int:
        return min(context, self.attends or context)

    def _bytes_per_key(self, kv_bytes: int) -> int:
        return self.kv_values_per_key * kv_bytes + (self.fp8_overhead_bytes if kv_bytes == 1 else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """`dense` parameters work for every token (dense or shared FFN, router); each expert has `expert` of them."""

    attention: Attention
    dense: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    expert: int = 0

    @property
    def parameters(self) -> int:
        return self.attention.parameters + self.dense + self.num_experts * self.expert

    @property
    def active_parameters(self) -> int:
        return self.attention.parameters + self.dense + self.num_experts_per_tok * self.expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model: kinds of layers with their counts, and the layer of its prediction module(s)."""

    name: str
    hidden_size: int
    vocab_size: int
    layers: tuple[tuple[int, Layer], ...]
    draft: Layer | None = None
    num_draft_modules: int = 0

    @property
    def num_layers(self) -> int:
        return sum(count for count, _ in self.layers)

    @property
    def head_parameters(self) -> int:
        """The LM head; the embedding has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Trunk with embedding and LM head (norms, a few thousandths of a percent, left out)."""
        return sum(count * layer.parameters for count, layer in self.layers) + 2 * self.head_parameters

    def num_active_parameters(self, with_head: bool = True) -> int:
        layers = sum(count * layer.active_parameters for count, layer in self.layers)
        return layers + (self.head_parameters if with_head else 0)

    def attention_flops(self, context: int) -> int:
        """Attention operations of one token over all layers."""
        return sum(count * layer.attention.flops(context) for count, layer in self.layers)

    def kv_bytes_stored(self, context: int, kv_bytes: int = 1) -> int:
        return sum(count * layer.attention.bytes_stored(context, kv_bytes) for count, layer in self.layers)

    def kv_bytes_read(self, context: int, kv_bytes: int = 1) -> int:
        return sum(count * layer.attention.bytes_read(context, kv_bytes) for count, layer in self.layers)


def grouped_query(
    hidden: int,
    heads: int,
    kv_heads: int,
    key_dim: int = 128,
    value_dim: int = 128,
    window: int | None = None,
) -> Attention:
    """Grouped-query attention, `window` keys wide if given."""
    projections = hidden * (heads * key_dim + kv_heads * (key_dim + value_dim) + heads * value_dim)
    return Attention(
        parameters=projections,
        flops_per_key=2 * heads * (key_dim + value_dim),
        kv_values_per_key=kv_heads * (key_dim + value_dim),
        num_kv_heads=kv_heads,
        attends=window,
    )


def latent(
    hidden: int,
    heads: int,
    q_rank: int = 1536,
    kv_rank: int = 512,
    rope: int = 64,
    nope: int = 128,
    value_dim: int = 128,
    top_k: int | None = None,
    index_heads: int = 64,
    index_dim: int = 128,
) -> Attention:
    """Multi-head latent attention, decoded in the latent space; `top_k` adds an indexer that picks the keys."""
    parameters = (
        hidden * q_rank
        + q_rank * heads * (nope + rope)
        + hidden * (kv_rank + rope)
        + kv_rank * heads * (nope + value_dim)
        + heads * value_dim * hidden
    )
    if top_k:
        parameters += q_rank * index_heads * index_dim + hidden * index_dim + hidden * index_heads
    return Attention(
        parameters=parameters,
        flops_per_key=2 * heads * (kv_rank + rope + kv_rank),
        kv_values_per_key=kv_rank + rope,
        num_kv_heads=1,
        attends=top_k,
        keeps_all=True,
        fp8_overhead_bytes=MLA_FP8_OVERHEAD,
        indexer_flops_per_key=2 * index_heads * index_dim if top_k else 0,
        indexer_bytes_per_key=INDEXER_BYTES if top_k else 0,
    )


def dense_layer(attention: Attention, hidden: int, intermediate: int) -> Layer:
    return Layer(attention=attention, dense=3 * hidden * intermediate)


def moe_layer(
    attention: Attention, hidden: int, experts: int, active: int, intermediate: int, shared: int = 0
) -> Layer:
    """SwiGLU experts of width `intermediate`, a router, and a shared expert of width `shared`."""
    return Layer(
        attention=attention,
        dense=experts * (hidden + 1) + 3 * hidden * shared,
        num_experts=experts,
        num_experts_per_tok=active,
        expert=3 * hidden * intermediate,
    )


def from_config(config: ModelConfig, name: str) -> Architecture:
    """The sizes of a step3p5 configuration."""

    def convert(layer: LayerConfig) -> Layer:
        attention = grouped_query(
            config.hidden_size,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_dim,
            layer.head_dim,
            layer.window,
        )
        attention = replace(attention, parameters=cost.num_attention_parameters(config, layer))
        if not layer.is_moe:
            return dense_layer(attention, config.hidden_size, config.intermediate_size)
        return moe_layer(
            attention,
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.moe_intermediate_size,
            config.shared_expert_intermediate_size,
        )

    kinds: dict[Layer, int] = {}
    for layer in map(convert, config.trunk_layers):
        kinds[layer] = kinds.get(layer, 0) + 1
    return Architecture(
        name=name,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=tuple((count, layer) for layer, count in kinds.items()),
        draft=convert(config.mtp_layers[0]) if config.mtp_layers else None,
        num_draft_modules=config.num_mtp_layers,
    )


RELEASED_CONFIG = Path(__file__).with_name("step-3.5-flash.json")


def step_3_5_flash() -> Architecture:
    return from_config(ModelConfig.from_pretrained(RELEASED_CONFIG), "Step 3.5 Flash")


def deepseek_v3(top_k: int | None = None, name: str = "DeepSeek V3") -> Architecture:
    """DeepSeek V3; with `top_k` = 2048 its sparse-attention successor V3.2."""
    hidden = 7168
    attention = latent(hidden, 128, top_k=top_k)
    moe = moe_layer(attention, hidden, 256, 8, 2048, shared=2048)
    return Architecture(
        name=name,
        hidden_size=hidden,
        vocab_size=129280,
        layers=((3, dense_layer(attention, hidden, 18432)), (58, moe)),
        draft=moe,
        num_draft_modules=1,
    )


def kimi_k2() -> Architecture:
    hidden = 7168
    attention = latent(hidden, 64)
    moe = moe_layer(attention, hidden, 384, 8, 2048, shared=2048)
    return Architecture(
        name="Kimi K2 Thinking",
        hidden_size=hidden,
        vocab_size=163840,
        layers=((1, dense_layer(attention, hidden, 18432)), (60, moe)),
    )


def glm_4_7() -> Architecture:
    hidden = 5120
    attention = grouped_query(hidden, 96, 8)
    moe = moe_layer(attention, hidden, 160, 8, 1536, shared=1536)
    return Architecture(
        name="GLM-4.7",
        hidden_size=hidden,
        vocab_size=151552,
        layers=((3, dense_layer(attention, hidden, 12288)), (89, moe)),
        draft=moe,
        num_draft_modules=1,
    )


def minimax_m2_1() -> Architecture:
    hidden = 3072
    moe = moe_layer(grouped_query(hidden, 48, 8), hidden, 256, 8, 1536)
    # Its configuration names prediction modules without public weights; one like a trunk layer is assumed.
    return Architecture(
        name="MiniMax M2.1",
        hidden_size=hidden,
        vocab_size=200064,
        layers=((62, moe),),
        draft=moe,
        num_draft_modules=1,
    )


def mimo_v2_flash() -> Architecture:
    hidden = 4096
    full = grouped_query(hidden, 64, 4, key_dim=192)
    sliding = grouped_query(hidden, 64, 8, key_dim=192, window=128)
    return Architecture(
        name="MiMo-V2 Flash",
        hidden_size=hidden,
        vocab_size=152576,
        layers=(
            (1, dense_layer(full, hidden, 16384)),
            (8, moe_layer(full, hidden, 256, 8, 2048)),
            (39, moe_layer(sliding, hidden, 256, 8, 2048)),
        ),
        draft=dense_layer(sliding, hidden, 16384),
        num_draft_modules=3,
    )


def load_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    return raw


def load_architecture(path: Path) -> Architecture:
    """A config.json (or its folder): step3p5 exactly, others by the usual Hugging Face keys.

    Raises:
        ConfigError: a needed key is missing or the model is not a transformer of a known form.
    """
    if path.suffix == ".gguf":
        return from_config(ModelConfig.from_pretrained(path), path.stem)
    raw = load_json(path / "config.json" if path.is_dir() else path)
    name = path.name if path.is_dir() else path.stem
    text = raw.get("text_config", raw)
    if str(text.get("model_type", raw.get("model_type"))).startswith("step3p"):
        return from_config(ModelConfig.from_dict(raw), name)
    return from_hugging_face(text, name)


def from_hugging_face(raw: Mapping[str, Any], name: str) -> Architecture:
    """Grouped-query or latent attention, full or sliding by `layer_types`, dense or routed FFN.

    Raises:
        ConfigError: naming the missing key.
    """

    def size(*keys: str, default: int | None = None) -> int:
        value = next((raw[key] for key in keys if raw.get(key) is not None), default)
        # A default of 0 means that the model may do without.
        least = 0 if default == 0 else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: {keys[0]} = {value!r}: the cost model needs this size")
        return value

    hidden, num_layers, heads = (
        size("hidden_size"),
        size("num_hidden_layers"),
        size("num_attention_heads"),
    )
    types = raw.get("layer_types") or ["full_attention"] * num_layers
    if not isinstance(types, list) or len(types) < num_layers:
        raise ConfigError(f"{name}: layer_types does not name the attention of all {num_layers} layers")
    if unknown := set(types[:num_layers]) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{name}: layer_types has {min(map(str, unknown))!r}, which the cost model does not know"
        )
    intermediate = size("intermediate_size", "moe_intermediate_size")
    experts = size("n_routed_experts", "num_experts", "num_local_experts", default=0)
    width = size("moe_intermediate_size", default=intermediate)
    num_dense = size("first_k_dense_replace", default=0) if experts else num_layers
    shared = size("shared_expert_intermediate_size", default=size("n_shared_experts", default=0) * width)

    def attention(kind: str) -> Attention:
        if raw.get("kv_lora_rank"):
            return latent(
                hidden,
                heads,
                q_rank=size("q_lora_rank"),
                kv_rank=size("kv_lora_rank"),
                rope=size("qk_rope_head_dim"),
                nope=size("qk_nope_head_dim"),
                value_dim=size("v_head_dim"),
                top_k=size("index_topk", default=0) or None,
                index_heads=size("index_n_heads", default=64),
                index_dim=size("index_head_dim", default=128),
            )
        dim = size("head_dim", default=hidden // heads)
        window = size("sliding_window") if kind == "sliding_attention" else None
        kv_heads = size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ConfigError(f"{name}: {heads} attention heads do not divide by {kv_heads} key-value heads")
        return grouped_query(hidden, heads, kv_heads, dim, size("v_head_dim", default=dim), window)

    kinds: dict[Layer, int] = {}
    for index, kind in zip(range(num_layers), types, strict=False):
        layer = (
            dense_layer(attention(kind), hidden, intermediate)
            if index < num_dense
            else moe_layer(
                attention(kind),
                hidden,
                experts,
                size("num_experts_per_tok", "moe_topk"),
                width,
                shared,
            )
        )
        kinds[layer] = kinds.get(layer, 0) + 1
    modules = size("num_nextn_predict_layers", "num_mtp_modules", default=0)
    return Architecture(
        name=name,
        hidden_size=hidden,
        vocab_size=size("vocab_size"),
        layers=tuple((count, layer) for layer, count in kinds.items()),
        draft=next(reversed(kinds)) if modules else None,
        num_draft_modules=modules,
    )
