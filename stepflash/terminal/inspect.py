"""`stepflash inspect`: the report of a model as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stepflash.terminal.model_report import is_complete, model_report, resolve_model_or_config, verify

NUM_LISTED = 20
PROBLEMS = ("missing", "unexpected", "wrong_shape")
LEVEL_STYLES = {"error": "red", "warning": "yellow", "note": ""}

Line = Callable[..., None]


def run_inspect(model: str, *, should_verify: bool, as_json: bool) -> int:
    """Print the report of a model; the status is 1 if something about the checkpoint is wrong."""
    path = resolve_model_or_config(model)
    values = model_report(path)
    if should_verify and "error" not in values["tensors"]:
        with _progress_bar() as bar:
            task = bar.add_task("verifying", total=None)
            values["verified"] = verify(
                path, lambda done, total: bar.update(task, completed=done, total=total)
            )
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        print_report(values, Console())
    return 0 if is_complete(values) else 1


def print_report(values: dict[str, Any], console: Console) -> None:
    """The report as text."""

    def line(label: str, text: str, style: str = "") -> None:
        console.print(f"{label:<38}{text}", style=style, markup=False, highlight=False, soft_wrap=True)

    parameters, kv_cache = values["parameters"], values["kv_cache"]
    line("model", values["path"], "bold")
    for key, value in values["config"].items():
        line(f"  {key}", f"{value:,}" if isinstance(value, int) else f"{value:g}")
    console.print(_layer_table(values["layers"]))
    line("parameters", f"{parameters['trunk']:,} in the trunk, {parameters['active']:,} active for a token")
    if parameters["mtp_modules"]:
        line(
            "", " + ".join(f"{count:,}" for count in parameters["mtp_modules"]) + " in the prediction modules"
        )
        line("", f"{parameters['total']:,} together")
    line("kv cache", f"{_bytes(kv_cache['bytes_per_token'])} a token, {kv_cache['dtype']}")
    line(
        "",
        f"{_bytes(kv_cache['bytes_per_sequence'])} a sequence in the sliding layers"
        f" ({_bytes(kv_cache['bytes_per_sequence_with_mtp'])} with prediction modules)",
    )
    _print_tokenizer(values["tokenizer"], line)
    _print_tensors(values["tensors"], line)
    if receipt := values["receipt"]:
        line("receipt", receipt.get("error") or receipt["verdict"], "red" if "error" in receipt else "")
    if "verified" in values:
        _print_verified(values["verified"], line)


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    """One row for each kind of layer, in the order of their first appearance."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("attention", "q/kv x dim", "rotary", "feed-forward", "layers"):
        table.add_column(heading, no_wrap=heading != "layers")
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer in layers:
        limits = [f"{layer[key]:g}" if layer[key] else "-" for key in ("swiglu_limit", "shared_swiglu_limit")]
        kind = (
            "full" if layer["window"] is None else f"window {layer['window']}",
            f"{layer['num_heads']}/{layer['num_kv_heads']} x {layer['head_dim']}",
            f"{layer['rotary_dim']}, theta {layer['rope_theta']:g}{', scaled' if layer['rope_is_scaled'] else ''}",
            ("experts" if layer["is_moe"] else "dense")
            + ("" if limits == ["-", "-"] else f", clamp {limits[0]}/{limits[1]}"),
            "mtp" if layer["mtp_module"] is not None else "",
        )
        kinds.setdefault(kind, []).append(layer["index"])
    for (*cells, mtp), indices in kinds.items():
        table.add_row(*cells, _ranges(indices) + (" (mtp)" if mtp else ""))
    return table


def _ranges(indices: list[int]) -> str:
    """Ascending numbers, neighbours as a range: 0, 2-4."""
    # Neighbours keep the difference between value and place.
    runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _print_tokenizer(tokenizer: dict[str, Any], line: Line) -> None:
    if "error" in tokenizer:
        line("tokenizer", tokenizer["error"], "red")
        return
    stops = ", ".join(map(str, tokenizer["eos_token_ids"]))
    line("tokenizer", f"{tokenizer['vocab_size']:,} tokens, stops at {stops}")
    line("chat template", tokenizer["chat_template"])


def _print_tensors(tensors: dict[str, Any], line: Line) -> None:
    if "error" in tensors:
        line("tensors", tensors["error"], "red")
        return
    mtp = f", {tensors['num_mtp_modules']} prediction modules"
    line(
        "tensors", f"{tensors['num_found']} found, {_bytes(tensors['num_bytes'])} of {tensors['format']}{mtp}"
    )
    for name in PROBLEMS:
        listed = tensors[name]
        if not listed:
            continue
        line("", f"{len(listed)} {name.replace('_', ' of a ')}:", "red")
        for entry in listed[:NUM_LISTED]:
            text = (
                entry
                if isinstance(entry, str)
                else f"{entry['name']}: {entry['found']}, not {entry['expected']}"
            )
            line("", f"  {text}", "red")
        if len(listed) > NUM_LISTED:
            line("", f"  and {len(listed) - NUM_LISTED} more (--json lists all)", "red")
    if not any(tensors[name] for name in PROBLEMS):
        line("", "all that the configuration needs, nothing left over", "green")


def _print_verified(verified: dict[str, Any], line: Line) -> None:
    for finding in verified["findings"]:
        line(
            f"  {finding['level']}",
            f"{finding['subject']}: {finding['message']}",
            LEVEL_STYLES[finding["level"]],
        )
    verdict = "nothing is wrong with them" if verified["passed"] else "they cannot be right"
    line(
        "values",
        f"{verified['num_tensors']} tensors read in {verified['seconds']:.1f} s: {verdict}",
        "green" if verified["passed"] else "red",
    )
    if "receipt" in verified:
        line("", verified["receipt"], "green")
    predictions = verified.get("predictions")
    if predictions is None:
        return
    if "skipped" in predictions:
        line("prediction of English", f"not tried: {predictions['skipped']}", "yellow")
        return
    heads = ["trunk", *(f"module {k}" for k in range(1, len(predictions["mean_logprobs"])))]
    figures = [
        f"{head} {logprob:.2f} ({top1:.0%} right)"
        for head, logprob, top1 in zip(heads, predictions["mean_logprobs"], predictions["top1"], strict=True)
    ]
    line("prediction of English", ", ".join(figures) + f"; chance is {predictions['uniform_logprob']:.2f}")
    if not predictions["passed"]:
        line("", "too close to chance for a model that knows English", "yellow")


def _progress_bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:g} {unit}" if size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
