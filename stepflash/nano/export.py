"""From a training checkpoint to what the package ships: `python -m stepflash.nano.export RUN OUT`.

The official FP8 layout: routed experts in e4m3 with one fp32 scale for each block of 128 x 128, everything else bf16.
It is half the size, and loading nano exercises the same code as the released FP8 repository. The model card is
written from the evaluation's own results.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.training.checkpoint import load_checkpoint

BLOCK = 128
E4M3_MAX = 448.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[experts, out, in] -> (float8_e4m3fn of the same shape, scales [experts, ceil(out/128), ceil(in/128)] fp32).

    weight = fp8 * scale of its block (the released repository's `weight_scale_inv`).
    """
    experts, rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(experts, padded.shape[1] // BLOCK, BLOCK, padded.shape[2] // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(2, 4)).clamp(min=1e-12) / E4M3_MAX
    scaled = (blocks / scales[:, :, None, :, None]).view_as(padded)[:, :rows, :cols]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scales


def export(run: Path, out: Path) -> None:
    """Write config, tokenizer and weights of the run's checkpoint.

    Raises:
        WeightsError: the run has no checkpoint yet.
    """
    saved = load_checkpoint(run / "checkpoint.pt")
    if saved is None:
        raise WeightsError(
            f"{run}: no checkpoint.pt; train first with python -m stepflash.nano.train --out {run}"
        )
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in saved["model"].items():
        if tensor.ndim == 3:
            tensors[name], tensors[name.removesuffix("weight") + "weight_scale_inv"] = quantize_blocks(tensor)
        elif name.endswith(("moe.gate.weight", "moe.router_bias")):
            tensors[name] = tensor.float().contiguous()
        else:
            tensors[name] = tensor.bfloat16().contiguous()
    metadata = {"format": "pt", "seed": str(saved["seed"]), "tokens": str(saved["tokens"])}
    save_file(tensors, out / "model.safetensors", metadata=metadata)
    config: dict[str, Any] = {
        **saved["config"],
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
    }
    generation = json.loads((run / "generation_config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = generation["eos_token_id"]
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for file in TOKENIZER_FILES:
        shutil.copyfile(run / file, out / file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stepflash.nano.export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    options = parser.parse_args(arguments)
    export(options.run, options.out)


if __name__ == "__main__":
    main()
