"""The model card of nano, written from its evaluation: `python -m stepflash.nano.card FOLDER RESULTS.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stepflash.model.config import ModelConfig

TEMPLATE = Path(__file__).with_name("card.md")


def write_card(folder: Path, results: list[dict[str, Any]], name: str = "nano") -> Path:
    """Write README.md beside the weights from the rows of `stepflash.nano.evaluate --json`."""
    config = ModelConfig.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    full = next(layer for layer in config.layers if layer.window is None)
    sliding = next(layer for layer in config.layers if layer.window is not None)
    text = TEMPLATE.read_text(encoding="utf-8").format(
        name=name,
        total=config.num_parameters(trunk=False) / 1e6,
        active=config.num_active_parameters() / 1e6,
        layers=config.num_layers,
        full=", ".join(str(i) for i, layer in enumerate(config.trunk_layers) if layer.window is None),
        window=sliding.window,
        hidden=config.hidden_size,
        heads_full=full.num_heads,
        heads_sliding=sliding.num_heads,
        head_dim=full.head_dim,
        experts=config.num_experts,
        width=config.moe_intermediate_size,
        top_k=config.num_experts_per_tok,
        modules=config.num_mtp_layers,
        vocab=config.vocab_size,
        seed=metadata["seed"],
        tokens=int(metadata["tokens"]),
        modules_seed=metadata["modules_seed"],
        modules_tokens=int(metadata["modules_tokens"]),
        count=results[0]["num_items"],
        tables="\n\n".join(_table(results, tier) for tier in ("easy", "hard")),
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _table(results: list[dict[str, Any]], tier: str) -> str:
    rows = [row for row in results if row["tier"] == tier]
    if not rows:
        return ""
    steps = sum(row["drafted"][0] for row in rows)
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    drafts = sum(sum(row["accepted"]) for row in rows) / max(steps, 1)
    lines = [f"| {tier} tier | items | exact | accepted drafts a step |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['task']} | {row['num_items']} | {row['accuracy']:.2f} | {row['accepted_per_step']:.2f} |"
        for row in rows
    ]
    return "\n".join([*lines, f"| **mean** | | **{mean:.3f}** | **{drafts:.2f}** |"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stepflash.nano.card", description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("results", type=Path, help="what `python -m stepflash.nano.evaluate --json` wrote")
    options = parser.parse_args(arguments)
    print(write_card(options.folder, json.loads(options.results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
