"""`stepflash quantize`: the command around `quantize.py` and `receipt.py`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepflash.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

Accuracy = Callable[[Path, int], dict[str, dict[str, float]]]
EPILOG_PROTECT = "a shell pattern over tensor names and a format, such as 'model.layers.7.*=int8'; repeatable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepflash quantize`."""
    parser.add_argument("model", metavar="MODEL", help="a folder of safetensors, a hub id or 'nano'")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--format",
        default="int4",
        metavar="FORMAT",
        help="int4 (-g32, -g64, -g128), int8 (-g32, -g64, -g128), fp8 or bf16 (%(default)s)",
    )
    parser.add_argument(
        "--protect", action="append", default=[], metavar="PATTERN=FORMAT", help=EPILOG_PROTECT
    )
    parser.add_argument(
        "--edge",
        default="int8",
        metavar="FORMAT",
        help="of the layers at both ends, which quantise badly; 'none' treats them like the others (%(default)s)",
    )
    parser.add_argument(
        "--rounding",
        choices=("gptq", "nearest"),
        help="gptq uses calibration text and is the default of int4; nearest needs none",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibrate on this text, parts separated by lines of --- (a shipped set of short tasks)",
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign the receipt with this Ed25519 key, made if missing"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="measure on this text; parts are separated by lines of ---"
    )
    parser.add_argument(
        "--tasks",
        type=int,
        default=0,
        metavar="N",
        help="for nano: exact match of N held-out prompts of each of its tasks, before and after, in the receipt",
    )
    parser.add_argument("--no-measure", action="store_true", help="a receipt with digests only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace, accuracy: Accuracy) -> int:
    """Quantise, measure, write the receipt; the status is 1 if the quality did not pass.

    Args:
        accuracy: that of a model with nano's tokenizer on nano's tasks, for `--tasks`.
    """
    from stepflash.tools.quantize import GPTQ, NEAREST, make_recipe, quantize_checkpoint
    from stepflash.tools.receipt import CALIBRATION_TEXTS, documents, measure, write_receipt
    from stepflash.weights.checkpoint import open_checkpoint
    from stepflash.weights.hub import resolve_model
    from stepflash.weights.signature import open_signing_key, public_hex

    source = open_checkpoint(resolve_model(options.model))
    if options.tasks < 0:
        raise ConfigError(f"--tasks must be 0 or more, got {options.tasks}")
    if options.tasks and not _has_nanos_tokenizer(source.path):
        raise ConfigError(f"--tasks are nano's own tasks; {options.model} does not have nano's tokenizer")
    protect = [_protected(text) for text in options.protect]
    recipe = make_recipe(source.config, options.format, protect, options.edge)
    rounding = options.rounding or (GPTQ if recipe.format.startswith("int4") else NEAREST)
    if rounding == NEAREST and options.calibration is not None:
        raise ConfigError("--calibration is for --rounding gptq, the default of int4")
    calibration: list[Tensor] = []
    origin = ""
    if rounding == GPTQ:
        calibration, origin = documents(source.path, options.calibration, CALIBRATION_TEXTS)
        origin = f"{sum(map(len, calibration))} tokens of {origin}"
    recipe = replace(recipe, rounding=rounding, calibration=origin)
    key = open_signing_key(options.sign) if options.sign is not None else None
    token_ids, origin = documents(source.path, options.text)
    with _progress_bar() as bar:
        task = bar.add_task("quantising", total=None)
        try:
            tensors = quantize_checkpoint(
                source,
                options.out,
                recipe,
                token_ids=calibration,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except KeyboardInterrupt:
            print(
                f"stepflash: interrupted; finished files are kept, the same command goes on in {options.out}",
                file=sys.stderr,
            )
            raise
        quality = None
        if not options.no_measure:
            task = bar.add_task("comparing", total=None)
            quality = measure(
                source,
                open_checkpoint(options.out),
                token_ids,
                origin,
                on_layer=lambda done, total: bar.update(task, completed=done, total=total),
            )
    tasks = None
    if options.tasks:
        with _silent_loading():
            before, after = (accuracy(path, options.tasks) for path in (source.path, options.out))
        tasks = {tier: {"before": before[tier], "after": after[tier]} for tier in before}
    receipt = write_receipt(options.out, tensors, asdict(recipe), quality, key, tasks)
    if key is not None:
        print(f"signed with the public key {public_hex(key)}", file=sys.stderr)
    _print(options, receipt)
    return 0 if quality is None or quality.passed else 1


@contextmanager
def _silent_loading() -> Iterator[None]:
    """Without the loader's warnings: that the checkpoint has no receipt yet is no news here."""
    log = logging.getLogger("stepflash.weights.receipt")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _has_nanos_tokenizer(path: Path) -> bool:
    from stepflash.weights.hub import NANO_FOLDER

    own, nanos = path / "tokenizer.json", NANO_FOLDER / "tokenizer.json"
    return own.is_file() and nanos.is_file() and own.read_bytes() == nanos.read_bytes()


def _protected(text: str) -> tuple[str, str]:
    pattern, equals, name = text.partition("=")
    if not (pattern and equals and name):
        raise ConfigError(f"--protect is PATTERN=FORMAT, for example 'model.layers.7.*=int8', not {text!r}")
    return pattern, name


def _print(options: argparse.Namespace, receipt: dict[str, Any]) -> None:
    from stepflash.weights.checkpoint import open_checkpoint
    from stepflash.weights.receipt import read_receipt, verdict

    checkpoint = open_checkpoint(options.out)
    num_bytes = checkpoint.num_bytes
    bits = 8 * num_bytes / checkpoint.config.num_parameters(trunk=False)
    if options.json:
        values = {"out": str(options.out), "num_bytes": num_bytes, "bits_per_weight": round(bits, 3)}
        print(
            json.dumps(
                values | {key: receipt[key] for key in ("recipe", "source_sha256", "quality", "tasks")}
            )
        )
        return
    print(f"{options.out}: {num_bytes / 1e6:,.1f} MB, {bits:.2f} bits a weight")
    print(verdict(read_receipt(options.out)))
    if receipt["quality"] is not None and not receipt["quality"]["passed"]:
        limits = receipt["quality"]["limits"]
        print(
            f"did not pass: wanted are a mean KL of at most {limits['mean_kl']:g} and an agreement of at least "
            f"{limits['top1_agreement']:.0%}; try --format int8, more --protect, calibration on text of its own "
            "use, or measure on such text (--text)"
        )
    for tier, found in (receipt["tasks"] or {}).items():
        before, after = found["before"], found["after"]
        print(
            f"{before['items']} {tier} tasks: {before['exact']:.1%} right before, {after['exact']:.1%} after"
        )
    if receipt["quality"] is None:
        return
    print(f"{'layer':>5} {'error':>8} {'drift':>8} {'routing':>8}")
    for layer in receipt["quality"]["layers"]:
        routing = "-" if layer["routing"] is None else f"{layer['routing']:.1%}"
        print(f"{layer['layer']:>5} {layer['error']:>8.4f} {layer['drift']:>8.4f} {routing:>8}")
    if drafts := receipt["quality"]["mtp_top1_agreement"]:
        print("drafts that agree, by prediction module: " + ", ".join(f"{share:.1%}" for share in drafts))


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
