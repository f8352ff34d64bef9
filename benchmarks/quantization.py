"""What protection of the edge layers and calibrated rounding buy: one table, from one run.

    python benchmarks/quantization.py [MODEL] [--tasks N] [--json FILE]

Quantises MODEL (nano) in each way into a temporary folder and compares it with the original on the shipped texts.
With --tasks N, for nano, also the exact match on N held-out prompts of each task and tier, before and after.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepflash.nano.evaluate import accuracy_by_tier
from stepflash.tools.quantize import GPTQ, NEAREST, make_recipe, quantize_checkpoint
from stepflash.tools.receipt import CALIBRATION_TEXTS, documents, measure
from stepflash.weights.checkpoint import open_checkpoint
from stepflash.weights.hub import resolve_model

# format, edge, rounding
WAYS = [("int4-g32", edge, rounding) for edge in ("none", "int8", "bf16") for rounding in (NEAREST, GPTQ)] + [
    ("int4-g128", "int8", NEAREST),
    ("int4-g128", "int8", GPTQ),
    ("int8", "none", NEAREST),
    ("int8", "bf16", NEAREST),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument(
        "--tasks", type=int, default=0, metavar="N", help="held-out prompts of each task and tier"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    source = open_checkpoint(resolve_model(options.model))
    calibration, _ = documents(source.path, None, CALIBRATION_TEXTS)
    token_ids, origin = documents(source.path)
    tasks = " easy | hard |" if options.tasks else ""
    print(f"{sum(map(len, calibration))} calibration tokens, {sum(map(len, token_ids))} tokens of {origin}")
    print(
        f"| format | edge | rounding | bits | mean KL | median KL | top-1 | routing | drafts | seconds |{tasks}"
    )
    print("|---" * (12 if options.tasks else 10) + "|")
    if options.tasks:
        before = accuracy_by_tier(options.model, options.tasks)
        print(
            f"| original | | | | | | | | | | {before['easy']['exact']:.1%} | {before['hard']['exact']:.1%} |",
            flush=True,
        )
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="stepflash-quantization-"))
    try:
        for name, edge, rounding in WAYS:
            out = folder / f"{name}-{edge}-{rounding}"
            recipe = replace(make_recipe(source.config, name, edge=edge), rounding=rounding)
            start = time.perf_counter()
            quantize_checkpoint(source, out, recipe, token_ids=calibration)
            seconds = time.perf_counter() - start
            quality = measure(source, open_checkpoint(out), token_ids, origin)
            bits = 8 * open_checkpoint(out).num_bytes / source.config.num_parameters(trunk=False)
            row = {"format": name, "edge": edge, "rounding": rounding, "bits": bits, "seconds": seconds}
            row |= {key: getattr(quality, key) for key in ("mean_kl", "median_kl", "top1_agreement")}
            row |= {"routing": quality.routing_agreement, "drafts": quality.mtp_top1_agreement[:1]}
            line = (
                f"| {name} | {edge} | {rounding} | {bits:.2f} | {quality.mean_kl:.4f} | {quality.median_kl:.4f} "
                f"| {quality.top1_agreement:.1%} | {quality.routing_agreement or 1:.1%} "
                f"| {(quality.mtp_top1_agreement or [0])[0]:.1%} | {seconds:.1f} |"
            )
            if options.tasks:
                row |= accuracy_by_tier(str(out), options.tasks)
                line += f" {row['easy']['exact']:.1%} | {row['hard']['exact']:.1%} |"
            print(line, flush=True)
            rows.append(row)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
