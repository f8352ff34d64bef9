"""The micro checkpoint in other clothes, written without the code under test: other writers, names by hand."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepflash.gguf_file import TensorToWrite, TypedValue, write_gguf

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
NUM_LAYERS, NUM_MTP = 8, 3


def micro_tensors() -> dict[str, Tensor]:
    return load_file(MICRO / "model-00001.safetensors")


def micro_config() -> dict[str, Any]:
    return json.loads((MICRO / "config.json").read_text())


def golden(name: str, array: str) -> Tensor:
    return torch.from_numpy(np.load(MICRO / f"{name}.npz")[array])


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    num_shards: int = 2,
) -> Path:
    """A sharded safetensors folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or micro_config()))
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_shards):
        part = names[i::num_shards]
        file_name = f"model-{i + 1:05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def block_scale(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """e4m3 weights and their inverse scales, patch by patch with slices."""
    matrices = weight.float().reshape(-1, *weight.shape[-2:])
    quantised = torch.empty_like(matrices)
    scales = torch.empty(
        len(matrices), math.ceil(weight.shape[-2] / block), math.ceil(weight.shape[-1] / block)
    )
    for e, matrix in enumerate(matrices):
        for i in range(scales.shape[1]):
            for j in range(scales.shape[2]):
                patch = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
                scales[e, i, j] = matrix[patch].abs().max() / 448
                quantised[e][patch] = matrix[patch] / scales[e, i, j]
    shape = (*weight.shape[:-2], *scales.shape[1:])
    return quantised.to(torch.float8_e4m3fn).view(weight.shape), scales.view(shape)


# By hand from spec 6.2; transforms of spec 6.3 in `gguf_tensors`.
GGUF_NAMES = [
    (r"model\.embed_tokens\.weight", "token_embd.weight"),
    (r"model\.norm\.weight", "output_norm.weight"),
    (r"lm_head\.weight", "output.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"blk.\1.attn_norm.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"blk.\1.ffn_norm.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", r"blk.\1.attn_\2.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", r"blk.\1.attn_output.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.g_proj\.weight", r"blk.\1.attn_gate.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight", r"blk.\1.attn_\2_norm.weight"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"blk.\1.ffn_\2.weight"),
    (r"model\.layers\.(\d+)\.moe\.gate\.weight", r"blk.\1.ffn_gate_inp.weight"),
    (r"model\.layers\.(\d+)\.moe\.router_bias", r"blk.\1.exp_probs_b.bias"),
    (r"model\.layers\.(\d+)\.moe\.(gate|up|down)_proj\.weight", r"blk.\1.ffn_\2_exps.weight"),
    (r"model\.layers\.(\d+)\.share_expert\.(gate|up|down)_proj\.weight", r"blk.\1.ffn_\2_shexp.weight"),
    (r"model\.layers\.(\d+)\.(enorm|hnorm|eh_proj)\.weight", r"blk.\1.nextn.\2.weight"),
    (
        r"model\.layers\.(\d+)\.transformer\.shared_head\.norm\.weight",
        r"blk.\1.nextn.shared_head_norm.weight",
    ),
    (
        r"model\.layers\.(\d+)\.transformer\.shared_head\.output\.weight",
        r"blk.\1.nextn.shared_head_head.weight",
    ),
]


def gguf_name(released: str) -> str:
    for pattern, replacement in GGUF_NAMES:
        if re.fullmatch(pattern, released):
            return re.sub(pattern, replacement, released)
    raise KeyError(released)


def gguf_metadata(mtp: bool = True) -> dict[str, Any]:
    """Metadata of micro as llama.cpp's converter writes it, plus the rotary scaling that stepflash adds."""
    full = [i % 4 == 0 for i in range(NUM_LAYERS + (NUM_MTP if mtp else 0))]
    metadata: dict[str, Any] = {
        "general.architecture": "step35",
        "step35.block_count": len(full),
        "step35.context_length": 4096,
        "step35.embedding_length": 128,
        "step35.feed_forward_length": 192,
        "step35.vocab_size": 512,
        "step35.attention.head_count": TypedValue("i32", [4 if flag else 6 for flag in full]),
        "step35.attention.head_count_kv": TypedValue("i32", [2] * len(full)),
        "step35.attention.key_length": 32,
        "step35.attention.value_length": 32,
        "step35.attention.layer_norm_rms_epsilon": 1e-5,
        "step35.attention.sliding_window": 16,
        "step35.attention.sliding_window_pattern": [not flag for flag in full],
        "step35.rope.freq_base": 5e6,
        "step35.rope.freq_base_swa": 1e4,
        "step35.rope.scaling.factor": 2.0,
        "step35.rope.scaling.original_context_length": 64,
        "step35.expert_count": 8,
        "step35.expert_used_count": 2,
        "step35.expert_feed_forward_length": 64,
        "step35.expert_shared_feed_forward_length": 64,
        "step35.expert_gating_func": 2,
        "step35.expert_weights_scale": 3.0,
        "step35.expert_weights_norm": True,
        "step35.leading_dense_block_count": 2,
        "step35.swiglu_clamp_exp": [7.0 if i in (6, 7) else 0.0 for i in range(len(full))],
        "step35.swiglu_clamp_shexp": [16.0 if i == 7 else 0.0 for i in range(len(full))],
    }
    if mtp:
        metadata["step35.nextn_predict_layers"] = NUM_MTP
    return metadata


def to_write(tensor: Tensor, type_name: str) -> TensorToWrite:
    """Row-major tensor -> ggml order and bytes."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name]
    raw = tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return TensorToWrite(tuple(reversed(tensor.shape)), type_name, [raw])


def gguf_tensors(type_name: str, mtp: bool = True) -> dict[str, TensorToWrite]:
    """Micro under GGUF names: norms + 1 in F32, vectors and the router F32, matrices in `type_name`."""
    tensors = {}
    for name, tensor in micro_tensors().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= NUM_LAYERS and not mtp:
            continue
        if name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        is_plain = tensor.ndim == 1 or name.endswith("moe.gate.weight")
        tensors[gguf_name(name)] = to_write(tensor, "F32" if is_plain else type_name)
    tensors["rope_freqs.weight"] = to_write(torch.ones(16), "F32")
    return tensors


def write_micro_gguf(path: Path, type_name: str = "F32", mtp: bool = True) -> Path:
    write_gguf(path, gguf_metadata(mtp), gguf_tensors(type_name, mtp))
    return path
