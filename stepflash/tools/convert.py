"""`stepflash convert`: a model as GGUF for llama.cpp, or as safetensors for transformers and vLLM."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

GGUF_TYPES, SAFETENSORS_TYPES = ("f32", "bf16", "q8_0", "q4_k_s"), ("f32", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepflash convert`."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a hub id or 'nano'")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .gguf file or the folder to write")
    parser.add_argument("--to", choices=("gguf", "safetensors"), required=True, help="the format to write")
    parser.add_argument(
        "--type",
        choices=GGUF_TYPES,
        default="bf16",
        help="of the matrices (%(default)s); q8_0 and q4_k_s are for gguf",
    )
    parser.add_argument(
        "--mtp", choices=("keep", "drop"), default="keep", help="the prediction modules (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT")


def run(options: argparse.Namespace) -> int:
    """Convert and say what was written; always 0."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from stepflash.tools.conversion import convert

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("converting"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def on_start(num_elements: int) -> Callable[[int], None]:
            task = bar.add_task("", total=num_elements)
            return lambda count: bar.advance(task, count)

        written = convert(
            options.model,
            options.out.expanduser(),
            options.to,
            options.type,
            keep_mtp=options.mtp == "keep",
            overwrite=options.overwrite,
            on_start=on_start,
        )
    for note in written.notes:
        console.print(f"note: {note}")
    print(
        f"{written.path}: {written.num_parameters / 1e9:.4g} B parameters, {written.num_bytes / 1e9:.4g} GB, "
        f"{8 * written.num_bytes / written.num_parameters:.2f} bits a weight"
    )
    return 0
