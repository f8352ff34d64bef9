"""A checkpoint as a safetensors folder in the released layout: names, stacked experts, shards, index, config.json.

Headers are computed before any weight is read, so that a shard is written front to back from pieces of a few MiB.
The router's bias is float32 as released. In bf16, router weights and norms that bf16 would change stay float32,
because the network computes with them in float32; all else is rounded.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.model.config import FULL, SLIDING, LayerConfig, ModelConfig
from stepflash.weights.checkpoint import Checkpoint
from stepflash.weights.names import Shape, expected_tensors, keeps_float32
from stepflash.weights.safetensors import INDEX_NAME, PLAIN_DTYPES
from stepflash.weights.stored import StoredTensor, small_pieces

SHARD_BYTES = 5_000_000_000
TYPES = {"f32": "F32", "bf16": "BF16"}
PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Planned:
    """One tensor to write."""

    name: str
    shape: Shape
    dtype_name: str
    stored: StoredTensor

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * PLAIN_DTYPES[self.dtype_name].itemsize


def plan_shards(
    checkpoint: Checkpoint, config: ModelConfig, type_name: str, shard_bytes: int = SHARD_BYTES
) -> list[list[Planned]]:
    """Tensors in the order of the layers, cut where a shard would grow beyond `shard_bytes`."""
    shards: list[list[Planned]] = []
    size = 0
    for name, shape in expected_tensors(config).items():
        stored = checkpoint.tensors[name]
        tensor = Planned(name, shape, _dtype_name(stored, TYPES[type_name]), stored)
        if not shards or size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _dtype_name(stored: StoredTensor, wanted: str) -> str:
    if wanted == "F32" or stored.name.endswith("router_bias"):
        return "F32"
    if keeps_float32(stored.name) and not all(_is_exact(piece) for piece in stored.values()):
        return "F32"
    return wanted


def _is_exact(piece: Tensor) -> bool:
    return torch.equal(piece.float().to(torch.bfloat16).float(), piece.float())


def write_shards(folder: Path, shards: list[list[Planned]], advance: Advance = lambda _: None) -> list[str]:
    """Write the shards and their index into an existing folder; returns the names of the files.

    Args:
        advance: called with the number of elements whenever some have been written.
    Raises:
        WeightsError: the disk is full, or a weight is not finite.
    """
    weight_map: dict[str, str] = {}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    try:
        for file_name, shard in zip(names, shards, strict=True):
            _write_shard(folder / file_name, shard, advance)
            weight_map |= {tensor.name: file_name for tensor in shard}
        total = sum(tensor.num_bytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{folder}: cannot write: {error.strerror or error}") from error
    return [*names, INDEX_NAME]


def _write_shard(path: Path, shard: list[Planned], advance: Advance) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype_name,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the safetensors library writes it
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in shard:
            written = sum(file.write(chunk) for chunk in _bytes(tensor, advance))
            assert written == tensor.num_bytes


def _bytes(tensor: Planned, advance: Advance) -> Iterator[bytes]:
    dtype = PLAIN_DTYPES[tensor.dtype_name]
    for piece in small_pieces(tensor.stored):
        yield piece.to(dtype).view(torch.uint8).numpy().tobytes()
        advance(piece.numel())


# ---- config.json ----------------------------------------------------------------------------------------------


def edited_config(raw: Mapping[str, Any], config: ModelConfig, type_name: str) -> dict[str, Any]:
    """A config.json for decoded weights: the source's own, without quantisation, wrapper and dropped modules."""
    outer = dict(raw)
    edited = {**outer, **outer["text_config"]} if isinstance(outer.get("text_config"), Mapping) else outer
    for key in ("quantization_config", "text_config", "vision_config", "dtype", "image_token_id"):
        edited.pop(key, None)
    edited |= {"architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5"}
    edited["torch_dtype"] = _torch_dtype(type_name)
    edited["num_nextn_predict_layers"] = config.num_mtp_layers
    for key in PER_LAYER:
        if isinstance(edited.get(key), list):
            edited[key] = edited[key][: len(config.layers)]
    return edited


def config_from_model(config: ModelConfig, type_name: str) -> dict[str, Any]:
    """config.json in the released spelling, for a source that has none (a GGUF)."""
    layers = config.layers
    full = next((layer for layer in layers if layer.window is None), layers[0])
    sliding = next((layer for layer in layers if layer.window is not None), layers[0])
    scaling = full.rope.scaling
    raw: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": _torch_dtype(type_name),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": full.num_heads,
        "num_attention_groups": full.num_kv_heads,
        "head_dim": full.head_dim,
        "max_seq_len": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "att_impl_type": "GQA",
        "use_qk_norm": True,
        "zero_centered": True,
        "sink": False,
        "use_head_wise_attn_gate": True,
        "sliding_window": sliding.window,
        "layer_types": [SLIDING if layer.window is not None else FULL for layer in layers],
        "attention_other_setting": {"attention_type": SLIDING, **_heads(sliding)},
        "rope_theta": [layer.rope.theta for layer in layers],
        "partial_rotary_factors": [layer.rope.rotary_dim / layer.head_dim for layer in layers],
        "yarn_only_types": [FULL],
        "use_rope_layers": [],
        "use_moe": True,
        "moe_layers_enum": ",".join(str(i) for i, layer in enumerate(layers) if layer.is_moe),
        "moe_num_experts": config.num_experts,
        "moe_top_k": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "share_expert_dim": config.shared_expert_intermediate_size,
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": config.router_scaling_factor,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "swiglu_limits": [layer.swiglu_limit or 0.0 for layer in layers],
        "swiglu_limits_shared": [layer.shared_swiglu_limit or 0.0 for layer in layers],
        "num_nextn_predict_layers": config.num_mtp_layers,
        "tie_word_embeddings": False,
    }
    if scaling is not None:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return raw


def _heads(layer: LayerConfig) -> dict[str, int]:
    return {
        "num_attention_heads": layer.num_heads,
        "num_attention_groups": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "true_head_dim": layer.head_dim,
    }


def _torch_dtype(type_name: str) -> str:
    return {"f32": "float32", "bf16": "bfloat16"}[type_name]
