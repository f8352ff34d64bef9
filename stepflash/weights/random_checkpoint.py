"""Random checkpoints in the released layout, for tests and for speed measurements without the real weights.

    python -m stepflash.weights.random_checkpoint mini OUT --seed 0

Names, shapes, shards and files are those of the released repository; only the numbers mean nothing. Clamps,
window and rotary scaling are chosen to matter at these sizes. The tokenizer is plain bytes plus special tokens.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepflash.model.config import ModelConfig
from stepflash.weights.names import Shape, expected_tensors, is_norm, layer_of
from stepflash.weights.safetensors import INDEX_NAME

SHARD_BYTES = 1 << 30
PIECE = 1 << 24  # a multiple of 16, so that the pieces hold what one draw of all of them would
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What distinguishes one layout; full layers have `heads` query heads, sliding ones `sliding_heads`."""

    hidden: int
    layers: int
    dense: int
    experts: int
    top_k: int
    expert_inter: int
    shared_inter: int
    inter: int
    heads: int
    sliding_heads: int
    kv_heads: int
    head_dim: int
    window: int
    vocab: int
    context: int
    rope_original: int
    mtp: int = 3


SIZES = {
    # 2.8 M parameters, small enough for unit tests.
    "micro": Size(
        hidden=128, layers=8, dense=2, experts=8, top_k=2, expert_inter=64, shared_inter=64, inter=192, heads=4,
        sliding_heads=6, kv_heads=2, head_dim=32, window=16, vocab=512, context=4096, rope_original=64,
    ),
    # 26 M parameters, every feature on.
    "tiny": Size(
        hidden=256, layers=8, dense=2, experts=16, top_k=4, expert_inter=256, shared_inter=256, inter=512, heads=4,
        sliding_heads=6, kv_heads=2, head_dim=64, window=32, vocab=1024, context=4096, rope_original=256,
    ),
    # 1.78 B parameters, 0.36 B of them read for a token: the size for speed.
    "mini": Size(
        hidden=1024, layers=16, dense=2, experts=64, top_k=8, expert_inter=512, shared_inter=512, inter=2816,
        heads=16, sliding_heads=24, kv_heads=4, head_dim=128, window=512, vocab=32768, context=32768,
        rope_original=16384,
    ),
    # 0.32 B parameters, 0.22 B of them read for a token, and 1.5 KiB of keys and values for one: weights dominate
    # at 32K tokens as they do in the released model (bf16: 11 % against 7 %).
    "long": Size(
        hidden=1024, layers=12, dense=2, experts=16, top_k=8, expert_inter=512, shared_inter=512, inter=2816, heads=8,
        sliding_heads=12, kv_heads=1, head_dim=128, window=512, vocab=32768, context=262144, rope_original=131072,
    ),
}  # fmt: skip


def config_json(size: Size) -> dict[str, Any]:
    """config.json in the released spelling: lists for trunk and MTP layers, a full layer in every four."""
    num_layers, total = size.layers, size.layers + size.mtp
    types = ["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(total)]
    full = [kind == "full_attention" for kind in types]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": [1, 2, SPECIAL_TOKENS.index("<|im_end|>")],
        "hidden_size": size.hidden,
        "intermediate_size": size.inter,
        "num_hidden_layers": num_layers,
        "num_attention_heads": size.heads,
        "num_attention_groups": size.kv_heads,
        "head_dim": size.head_dim,
        "max_seq_len": size.context,
        "max_position_embeddings": size.context,
        "vocab_size": size.vocab,
        "att_impl_type": "GQA",
        "use_qk_norm": True,
        "zero_centered": True,
        "use_head_wise_attn_gate": True,
        "sliding_window": size.window,
        "layer_types": types,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": size.sliding_heads,
            "num_attention_groups": size.kv_heads,
            "head_dim": size.head_dim,
            "true_head_dim": size.head_dim,
        },
        "rope_theta": [5000000.0 if flag else 10000.0 for flag in full],
        "partial_rotary_factors": [0.5 if flag else 1.0 for flag in full],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
            "original_max_position_embeddings": size.rope_original,
        },
        "yarn_only_types": ["full_attention"],
        "use_rope_layers": [],
        "use_moe": True,
        "moe_layers_enum": ",".join(str(i) for i in range(size.dense, num_layers)),
        "moe_num_experts": size.experts,
        "moe_top_k": size.top_k,
        "moe_intermediate_size": size.expert_inter,
        "share_expert_dim": size.shared_inter,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "swiglu_limits": [7.0 if num_layers - 2 <= i < num_layers else 0.0 for i in range(total)],
        "swiglu_limits_shared": [16.0 if i == num_layers - 1 else 0.0 for i in range(total)],
        "num_nextn_predict_layers": size.mtp,
        "tie_word_embeddings": False,
    }


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its released name: bf16, the selection bias float32 (as published)."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in expected_tensors(config).items():
        yield name, _random_tensor(config, name, shape, generator)


def _random_tensor(config: ModelConfig, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    if name.endswith("router_bias"):
        return _normal(shape, 0.05, generator, torch.float32)
    if is_norm(name):  # zero-centred
        return _normal(shape, 0.1, generator)
    gain = 1.0
    layer_idx = layer_of(name)
    if name == "model.embed_tokens.weight":
        gain = 0.5 * shape[-1] ** 0.5
    elif name == "lm_head.weight":
        gain = 2.0
    elif layer_idx is not None and config.layers[layer_idx].swiglu_limit is not None:
        # Large enough that the clamps bite; the routed experts come back to the size of the rest.
        down = 1 / 6 if ".moe." in name else 1.0
        gain = {"gate_proj": 6.0, "up_proj": 6.0, "down_proj": down}.get(name.split(".")[-2], 1.0)
    return _normal(shape, gain / shape[-1] ** 0.5, generator)


def _normal(
    shape: Shape, deviation: float, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Normally distributed values, drawn as float32 a few million at a time."""
    out = torch.empty(shape, dtype=dtype)
    for piece in out.view(-1).split(PIECE):  # type: ignore[no-untyped-call]
        piece.copy_(torch.empty(piece.shape).normal_(0, deviation, generator=generator))
    return out


def write_random_checkpoint(folder: Path, size: Size, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a whole checkpoint folder; returns its number of parameters. No more than one shard is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = config_json(size)
    config = ModelConfig.from_dict(raw)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    generation = {"bos_token_id": 0, "eos_token_id": raw["eos_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer(), ensure_ascii=False), encoding="utf-8")
    special = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(special, ensure_ascii=False), encoding="utf-8")

    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    num_parameters = num_shards = 0

    def flush() -> None:
        nonlocal num_shards
        if shard:
            num_shards += 1
            file_name = f"model-{num_shards:05d}.safetensors"
            save_file(shard, folder / file_name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file_name))
            shard.clear()

    for name, tensor in random_tensors(config, seed):
        shard[name] = tensor
        num_parameters += tensor.numel()
        if sum(part.nbytes for part in shard.values()) >= shard_bytes:
            flush()
    flush()
    index = {"metadata": {"total_parameters": num_parameters}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1))
    return num_parameters


def byte_tokenizer() -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE without merges: the special tokens, then the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    # GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on.
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count = write_random_checkpoint(arguments.out, SIZES[arguments.size], arguments.seed)
    print(f"{arguments.out}: {count / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
