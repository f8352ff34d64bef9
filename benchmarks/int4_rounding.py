"""Three ways to round int4 weights of the same model on the same calibration tokens: nearest, AWQ-style, GPTQ.

    python benchmarks/int4_rounding.py [MODEL] [--format int4-g32] [--edge int8]

AWQ (Lin et al., 2023) multiplies the columns of a matrix by s = mean(|x|)^a before rounding and divides its inputs
by s. Of a in 0, 0.05, ... 1 it takes the one that changes the output of the matrix least. In a model the division
has to fit into whatever comes before the matrix, so that matrices with one input share one s. Here every matrix and
every expert has its own, which a real checkpoint could not have: what AWQ reaches here is more than it could reach.

All three are compared as bf16 models of the rounded values, so the figures differ a little from those of packed
files. The prediction modules and the LM head stay as they are. Scales of groups are searched in the same way in all.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from stepflash.kernels.formats import Format, unpack
from stepflash.tools.calibrate import Calibration, Inputs, LayerRounder
from stepflash.tools.conversion import convert
from stepflash.tools.quantize import make_recipe, plan_tensors
from stepflash.tools.receipt import CALIBRATION_TEXTS, documents, measure
from stepflash.weights.checkpoint import Checkpoint, open_checkpoint, select_mtp
from stepflash.weights.hub import resolve_model
from stepflash.weights.load import materialize
from stepflash.weights.packed import pack_slab

EXPONENTS = [step / 20 for step in range(21)]


class Gptq(LayerRounder):
    """As `stepflash quantize` does it; keeps the rounded values."""

    def __init__(self, run: Calibration) -> None:
        super().__init__(run)
        self.values: dict[str, list[Tensor]] = {}

    def round_stacked(self, name: str, weight: Tensor, inputs: Inputs, out: Tensor) -> Tensor:
        values = self.rounded(name, weight, inputs, out)
        self.values.setdefault(name, []).append(values.bfloat16())
        return values

    def rounded(self, name: str, weight: Tensor, inputs: Inputs, out: Tensor) -> Tensor:
        """[batch, n, k] -> the values that stand for them."""
        return super().round_stacked(name, weight, inputs, out)


class Nearest(Gptq):
    def rounded(self, name: str, weight: Tensor, inputs: Inputs, out: Tensor) -> Tensor:
        return torch.stack([self.nearest(name, matrix) for matrix in weight])

    def nearest(self, name: str, matrix: Tensor) -> Tensor:
        fmt = self.formats[name]
        assert fmt is not None
        return unpack(pack_slab(self.tensors[name], matrix.contiguous(), fmt), fmt, *matrix.shape)


class Awq(Nearest):
    def rounded(self, name: str, weight: Tensor, inputs: Inputs, out: Tensor) -> Tensor:
        fmt = self.formats[name]
        if fmt is None or not fmt.is_int4:
            return super().rounded(name, weight, inputs, out)
        return torch.stack(
            [self.search(name, matrix, rows) for matrix, rows in zip(weight, inputs.rows, strict=True)]
        )

    def search(self, name: str, matrix: Tensor, rows: Tensor) -> Tensor:
        """The values of [n, k] that change its output for these rows [num_tokens, k] least."""
        size = rows.abs().mean(0).clamp_min(1e-4)
        products = rows.T @ rows
        best, least = matrix, float("inf")
        for exponent in EXPONENTS:
            scale = size**exponent
            scale /= (scale.max() * scale.min()).sqrt()
            values = self.nearest(name, matrix * scale) / scale
            difference = values - matrix
            error = float((difference @ products * difference).sum(dtype=torch.float64))
            if error < least:
                best, least = values, error
        return best


def rounded_values(
    kind: type[Gptq], source: Checkpoint, formats: Mapping[str, Format | None], token_ids: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Every rounded matrix of the trunk by released name, bf16."""
    run = Calibration(source, select_mtp(source, None), formats, token_ids)
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        hidden = F.embedding(run.ids, materialize(source.tensors["model.embed_tokens.weight"], torch.float32))
        for run.next_layer in range(source.config.num_layers):
            layer = kind(run)
            hidden = layer.run(hidden)
            for name, parts in layer.values.items():
                found[name] = torch.cat(parts).view(source.tensors[name].shape).clone()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--edge", default="int8")
    options = parser.parse_args()
    source = open_checkpoint(resolve_model(options.model))
    recipe = make_recipe(source.config, options.format, edge=options.edge)
    formats = {tensor.stored.name: tensor.fmt for tensor in plan_tensors(source, recipe)}
    calibration, _ = documents(source.path, None, CALIBRATION_TEXTS)
    token_ids, origin = documents(source.path)
    folder = Path(tempfile.mkdtemp(prefix="stepflash-int4-"))
    try:
        out = folder / "model"
        convert(options.model, out, "safetensors", "bf16", shard_bytes=1 << 40)
        (shard,) = out.glob("*.safetensors")
        tensors = load_file(shard)
        print(f"{options.format}, edge {options.edge}; {sum(map(len, token_ids))} tokens of {origin}")
        print("| rounding | mean KL | median KL | top-1 | routing |\n|---|---|---|---|---|", flush=True)
        for kind in (None, Nearest, Awq, Gptq):
            values = {} if kind is None else rounded_values(kind, source, formats, calibration)
            save_file(tensors | values, shard, metadata={"format": "pt"})
            found = measure(source, open_checkpoint(out), token_ids, origin)
            row = (f"{found.mean_kl:.4f}", f"{found.median_kl:.4f}", f"{found.top1_agreement:.1%}")
            name = "none (bf16)" if kind is None else kind.__name__.lower()
            print(f"| {name} | {' | '.join(row)} | {found.routing_agreement or 1:.1%} |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
