"""What a checkpoint is, as JSON values: configuration, layers, parameters, memory, tokenizer, tensors.

From headers alone, so the full model takes seconds and no memory; `verify` reads every value as well. Problems
of tokenizer and tensors are entries of the report (`error`), since the rest is still worth knowing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.errors import StepflashError
from stepflash.model import cost
from stepflash.model.config import LayerConfig, ModelConfig
from stepflash.weights.checkpoint import is_packed, open_checkpoint
from stepflash.weights.hub import resolve_model
from stepflash.weights.receipt import BAD, Receipt, read_receipt, standing, verdict
from stepflash.weights.verify import (
    ENGLISH_PARAGRAPH,
    check_predictions,
    inspect_checkpoint,
    verify_checkpoint,
)

KV_DTYPE = "bfloat16"
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_mtp_layers",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "router_scaling_factor",
    "rms_norm_eps",
    "max_position_embeddings",
)


def model_report(path: Path) -> dict[str, Any]:
    """Everything about the checkpoint or config.json at `path`, as JSON values.

    Raises:
        ConfigError: there is no usable configuration.
    """
    config = ModelConfig.from_pretrained(path)
    return {
        "path": str(path),
        "config": {key: getattr(config, key) for key in CONFIG_KEYS},
        "layers": [_layer(index, layer, config.num_layers) for index, layer in enumerate(config.layers)],
        "parameters": {
            "trunk": config.num_parameters(),
            "mtp_modules": [
                cost.num_mtp_parameters(config, module) for module in range(1, config.num_mtp_layers + 1)
            ],
            "total": config.num_parameters(trunk=False),
            "active": config.num_active_parameters(),
        },
        "kv_cache": {
            "dtype": KV_DTYPE,
            "bytes_per_token": config.kv_bytes_per_token(KV_DTYPE),
            "bytes_per_sequence": config.kv_bytes_per_sequence(KV_DTYPE),
            "bytes_per_sequence_with_mtp": config.kv_bytes_per_sequence(KV_DTYPE, mtp=True),
        },
        "tokenizer": _tokenizer(path, config),
        "tensors": _tensors(path),
        "receipt": _receipt(path),
    }


def verify(path: Path, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Read every value of the checkpoint and let the network predict a paragraph of English.

    The prediction loads the model and is left out when the memory of this machine cannot hold it.

    Raises:
        WeightsError, ConfigError: the checkpoint cannot be opened.
    """
    result = verify_checkpoint(path, on_progress)
    values: dict[str, Any] = {
        "passed": result.passed,
        "num_tensors": result.num_tensors,
        "num_bytes": result.num_bytes,
        "seconds": round(result.seconds, 3),
        "findings": [asdict(finding) for finding in result.findings],
    }
    if (receipt := _open_receipt(path)) is not None:
        for tensor in result.inspection.checkpoint.tensors.values():
            receipt.check(tensor)
        values["receipt"] = "every tensor has the digest of its receipt"
    if result.passed:
        values["predictions"] = _predictions(path, result.inspection.config)
    return values


def _open_receipt(path: Path) -> Receipt | None:
    return read_receipt(path) if path.is_dir() else None


def _receipt(path: Path) -> dict[str, Any]:
    """What the receipt of a quantised checkpoint says; empty for all others."""
    try:
        checkpoint = open_checkpoint(path) if path.is_dir() else None
        if checkpoint is None or not is_packed(checkpoint):
            return {}
        receipt = read_receipt(path)
    except StepflashError as error:
        return {"error": str(error)}
    level, reason = standing(checkpoint, receipt)
    values: dict[str, Any] = {
        "verdict": f"{level}: {reason}; quality {verdict(receipt)}",
        "standing": level,
        "is_good": receipt.is_good if receipt else None,
    }
    if values["is_good"] is False or level == BAD:
        values["error"] = values["verdict"]
    return values


def _predictions(path: Path, config: ModelConfig) -> dict[str, Any]:
    import torch

    from stepflash.weights.load import load_model

    needed = 2 * config.num_parameters(trunk=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.9 * memory:
        return {"skipped": f"needs {needed / 2**30:.0f} GiB of memory, this machine has {memory / 2**30:.0f}"}
    token_ids = Tokenizer.from_pretrained(path).encode(ENGLISH_PARAGRAPH)
    if config.bos_token_id is not None:
        token_ids = [config.bos_token_id, *token_ids]
    model = load_model(path, dtype="bfloat16")
    with torch.inference_mode():
        predictions = check_predictions(model, torch.tensor(token_ids))
    return {**asdict(predictions), "passed": predictions.passed}


def is_complete(values: dict[str, Any]) -> bool:
    """Whether nothing is wrong with the reported checkpoint, as far as it was looked at."""
    if values["path"].endswith(".json"):
        return True
    tensors = values["tensors"]
    problems = [values["tokenizer"].get("error"), values["receipt"].get("error")]
    problems += [tensors.get(key) for key in ("error", "missing", "unexpected", "wrong_shape")]
    return not any(problems) and values.get("verified", {}).get("passed", True)


def resolve_model_or_config(model: str) -> Path:
    """As everywhere, and a config.json alone, whose plan can be shown before anything is downloaded."""
    path = Path(model).expanduser()
    return path if path.is_file() and path.suffix == ".json" else resolve_model(model)


def _layer(index: int, layer: LayerConfig, num_trunk_layers: int) -> dict[str, Any]:
    return {
        "index": index,
        "mtp_module": index - num_trunk_layers + 1 if index >= num_trunk_layers else None,
        "window": layer.window,
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "rope_theta": layer.rope.theta,
        "rotary_dim": layer.rope.rotary_dim,
        "rope_is_scaled": layer.rope.scaling is not None,
        "is_moe": layer.is_moe,
        "swiglu_limit": layer.swiglu_limit,
        "shared_swiglu_limit": layer.shared_swiglu_limit,
    }


def _tokenizer(path: Path, config: ModelConfig) -> dict[str, Any]:
    if path.suffix == ".json":
        return {"error": "not looked for: this is a configuration alone"}
    try:
        tokenizer = Tokenizer.from_pretrained(path)
        tokenizer.check_vocab(config.vocab_size)
        template = ChatTemplate.from_pretrained(path, tokenizer)
    except StepflashError as error:
        return {"error": str(error)}
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
        "think_end_id": tokenizer.think_end_id,
        "chat_template": template.source,
    }


def _tensors(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return {"error": "not looked for: this is a configuration alone"}
    try:
        inspection = inspect_checkpoint(path)
    except StepflashError as error:
        return {"error": str(error)}
    comparison = inspection.comparison
    return {
        "format": inspection.checkpoint.kind,
        "num_found": inspection.num_found,
        "num_bytes": inspection.checkpoint.num_bytes,
        "num_mtp_modules": inspection.config.num_mtp_layers,
        "stored": [asdict(stored) for stored in inspection.stored],
        "missing": comparison.missing,
        "unexpected": comparison.unexpected,
        "wrong_shape": [
            {"name": name, "expected": list(expected), "found": list(found)}
            for name, expected, found in comparison.wrong_shape
        ],
    }
