"""`stepflash cost`: the card's decode-cost table beside the estimate, what moves it, and any other model in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepflash.errors import ConfigError
from stepflash.tools import decode_cost, plot
from stepflash.tools.architectures import from_config, load_architecture
from stepflash.tools.cost_fit import TOLERANCE, grid, leave_one_out
from stepflash.tools.decode_cost import SOURCES, Assumptions, CardEntry, Serving, card, compare, log_error
from stepflash.tools.hardware import CHIPS, Chip, parse_quantity
from stepflash.tools.plan_command import load_config
from stepflash.tools.published_costs import ablation_table, paper_cost, prefill_flops_tables

if TYPE_CHECKING:
    from rich.console import Console

SWEEP = (8192, 16384, 32768, 65536, 131072, 262144)
DEFAULTS = Assumptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepflash cost`."""
    parser.add_argument(
        "config",
        nargs="?",
        metavar="MODEL",
        help="a folder, config.json, .gguf, hub id or nano to add to the table",
    )
    parser.add_argument(
        "--context", type=int, default=DEFAULTS.context, metavar="N", help="tokens (%(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE", help="write cost against context as SVG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own = parser.add_argument_group("the added model", "served like Step 3.5 Flash on the card unless given")
    own.add_argument("--speed", type=float, default=100.0, metavar="T", help="tokens a second (%(default)g)")
    own.add_argument("--drafts", type=int, metavar="D", help="drafted tokens a step (3; 0 without modules)")
    own.add_argument("--gpus", type=int, default=8, metavar="G", help="GPUs that share it (%(default)s)")
    group = parser.add_argument_group("assumptions", "one set for all models")
    group.add_argument("--gpu", choices=sorted(CHIPS), default=DEFAULTS.chip.name, help="kind (%(default)s)")
    group.add_argument("--gpu-memory", metavar="SIZE", help="instead of the datasheet's, such as 96GB")
    group.add_argument("--gpu-bandwidth", metavar="RATE", help="such as 4TB/s")
    group.add_argument("--bf16-tflops", type=float, metavar="T", help="peak BF16 rate, dense")
    group.add_argument("--fp8-tflops", type=float, metavar="T", help="peak FP8 rate, dense")
    group.add_argument(
        "--acceptance", type=float, default=DEFAULTS.acceptance, metavar="P", help="of a draft (%(default)s)"
    )
    group.add_argument(
        "--layer-latency-us",
        type=float,
        default=DEFAULTS.layer_latency_us,
        metavar="US",
        help="fixed time for each layer (%(default)g)",
    )
    group.add_argument(
        "--efficiency", type=float, default=DEFAULTS.efficiency, metavar="E", help="of peak (%(default)g)"
    )
    group.add_argument(
        "--kv-bytes", type=int, choices=(1, 2), default=DEFAULTS.kv_bytes, help="(%(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table; always 0."""
    assumptions = Assumptions(
        chip=_chip(options),
        context=options.context,
        acceptance=options.acceptance,
        layer_latency_us=options.layer_latency_us,
        efficiency=options.efficiency,
        kv_bytes=options.kv_bytes,
    )
    entries = list(card())
    if options.config:
        entries.append(_added(options))
    rows = compare(entries, assumptions)
    sweep = context_sweep(entries, assumptions)
    if options.plot:
        labels = [_thousands(context) for context in SWEEP]
        title = "Cost of a decoded token / Step 3.5 Flash at 128K, against context"
        try:
            Path(options.plot).write_text(plot.svg_plot(title, labels, sweep), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{options.plot}: cannot write: {error.strerror or error}") from error
    if options.json:
        for row in rows:
            row["by_context"] = [
                {"context": context, "cost": cost}
                for context, cost in zip(SWEEP, sweep[row["model"]], strict=True)
            ]
        report = {
            **asdict(assumptions),
            "sources": SOURCES,
            "sensitivity": sensitivity(assumptions),
            "leave_one_out": leave_one_out(grid()),
        }
        print(json.dumps({"models": rows, "assumptions": report}))
    else:
        _print_report(rows, sweep, entries, assumptions)
    return 0


def context_sweep(entries: Sequence[CardEntry], assumptions: Assumptions) -> dict[str, list[float | None]]:
    """Cost of each model at each context of SWEEP, relative to the first model at 128K; None where impossible."""

    def costs(context: int) -> list[float]:
        at = replace(assumptions, context=context)
        return [
            decode_cost.estimate(entry.model, entry.serving, at).gpu_seconds_per_token for entry in entries
        ]

    base = costs(decode_cost.CONTEXT)[0]
    table = [costs(context) for context in SWEEP]
    return {
        entry.model.name: [
            row[index] / base if row[index] < float("inf") and base < float("inf") else None for row in table
        ]
        for index, entry in enumerate(entries)
    }


def variants(base: Assumptions) -> list[tuple[str, Assumptions, dict[str, float]]]:
    """One change each: its name, the assumptions, weight bits of single models."""
    changes: list[tuple[str, dict[str, Any]]] = [
        *((f"GPU {name}", {"chip": CHIPS[name]}) for name in ("H20", "H100", "H800", "H200")),
        ("H200, 25 % efficiency", {"chip": CHIPS["H200"], "efficiency": 0.25}),
        ("efficiency 60 %", {"efficiency": 0.6}),
        *((f"acceptance {p:g}", {"acceptance": p}) for p in (0.7, 0.8, 0.9, 1.0)),
        *((f"latency {us} us a layer", {"layer_latency_us": float(us)}) for us in (0, 50, 150)),
        *((f"{bits}-bit weights", {"weight_bits": float(bits)}) for bits in (4, 16)),
        ("BF16 keys and values", {"kv_bytes": 2}),
        ("FP8 attention math", {"attention_math": "fp8"}),
        ("reading and multiplying in turn", {"overlap": False}),
        ("busiest experts 1.5x the mean", {"imbalance": 1.5}),
        ("80 % of memory", {"memory_fraction": 0.8}),
        ("8 GB for activations", {"memory_reserve_gb": 8.0}),
        ("billed at the speed reached", {"bill_promised_speed": False}),
        ("sequences may be fractions", {"whole_sequences": False}),
        (
            "and data-parallel attention",
            {"tensor_parallel_attention": False, "whole_sequences": False},
        ),
    ]
    none: dict[str, float] = {}
    result = [(name, replace(base, **change), none) for name, change in changes]
    return [*result, ("INT4 weights for Kimi K2", base, {"Kimi K2 Thinking": 4.0})]


def sensitivity(base: Assumptions) -> list[dict[str, Any]]:
    """How one change at a time moves the card's ratios, as JSON values."""
    result = []
    for name, assumptions, weight_bits in variants(base):
        rows = compare(card(), assumptions, weight_bits)
        error = log_error(rows)
        result.append(
            {
                "change": name,
                "ratios": {row["model"]: row["ratio"] for row in rows},
                "rms_log_error": error if 0 < error < float("inf") else None,
            }
        )
    return result


def _chip(options: argparse.Namespace) -> Chip:
    chip = CHIPS[options.gpu]
    changes: dict[str, float] = {}
    if options.gpu_memory:
        changes["memory_bytes"] = parse_quantity(options.gpu_memory, "--gpu-memory")
    if options.gpu_bandwidth:
        changes["bandwidth"] = parse_quantity(options.gpu_bandwidth, "--gpu-bandwidth")
    for name in ("bf16", "fp8"):
        tflops = getattr(options, f"{name}_tflops")
        if tflops is not None:
            if tflops <= 0:
                raise ConfigError(f"--{name}-tflops must be positive, got {tflops:g}")
            changes[f"{name}_rate"] = tflops * 1e12
    # A changed chip has no rent: it is not the one that the price list means.
    return replace(chip, name=f"{chip.name}, changed", dollars_per_hour=None, **changes) if changes else chip


def _added(options: argparse.Namespace) -> CardEntry:
    path = Path(options.config).expanduser()
    if path.exists():
        model = load_architecture(path)
    else:
        model = from_config(load_config(options.config), options.config)
    drafts = options.drafts if options.drafts is not None else (3 if model.draft else 0)
    serving = Serving(speed=options.speed, num_drafts=drafts, num_gpus=options.gpus)
    return CardEntry(model=model, serving=serving, ratio=None)


def _print_report(
    rows: list[dict[str, Any]],
    sweep: dict[str, list[float | None]],
    entries: Sequence[CardEntry],
    assumptions: Assumptions,
) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    _print_ratios(console, rows, assumptions)
    _print_assumptions(console, assumptions)
    _print_sensitivity(console, assumptions)
    _print_leave_one_out(console)
    console.print("\nCost of a token against context, Step 3.5 Flash at 128K = 1", style="bold")
    console.print(plot.text_plot([_thousands(context) for context in SWEEP], sweep), markup=False)
    console.print("Only 128K has card values: the other contexts are predictions that nothing here checks.")
    _print_published(console, entries, assumptions)


def _print_ratios(console: Console, rows: list[dict[str, Any]], assumptions: Assumptions) -> None:
    title = f"Cost of a decoded token at {_thousands(assumptions.context)} context on {assumptions.chip.name}"
    console.print(title, style="bold")
    columns = ("model", "card", "ours", "error", "tok/s", "drafts", "GPUs", "batch", "limit", "$/M")
    cells = []
    for row in rows:
        dollars = row["dollars_per_million_tokens"]
        cells.append(
            (
                row["model"],
                _number(row["card_ratio"], ".1f"),
                _number(row["ratio"], ".2f"),
                _number(row["error"], "+.1%"),
                f"{row['speed']:g}",
                str(row["num_drafts"]),
                str(row["num_gpus"]),
                f"{row['batch']:g}",
                row["limit"],
                _number(dollars, ".2f"),
            )
        )
    console.print(_table(columns, cells))
    error = log_error(rows)
    if 0 < error < float("inf"):
        console.print(
            f"rms log error {error:.3f} over {sum(r['card_ratio'] is not None for r in rows[1:])} ratios"
        )
    console.print(
        "The fitted assumptions were chosen looking at these ratios: the agreement is in-sample. The card's method "
        "is not public. $/M is the rent alone and is checked by nothing."
    )


def _print_assumptions(console: Console, assumptions: Assumptions) -> None:
    console.print("\nAssumptions", style="bold")
    values = {**{name: getattr(assumptions, name) for name in SOURCES}, "chip": assumptions.chip.name}
    cells = [(name, str(values[name]), source) for name, source in SOURCES.items()]
    console.print(_table(("name", "value", "from"), cells, right=False))
    chip = assumptions.chip
    console.print(
        f"{chip.name}: {chip.memory_bytes / 1e9:g} GB, {chip.bandwidth / 1e12:g} TB/s, "
        f"{chip.bf16_rate / 1e12:g} TFLOP/s BF16, {chip.fp8_rate / 1e12:g} FP8 (datasheet unless changed)"
    )


def _print_sensitivity(console: Console, assumptions: Assumptions) -> None:
    console.print(
        "\nOne change at a time: the ratios (- cannot be served so), and their rms log error", style="bold"
    )
    changed = sensitivity(assumptions)
    names = list(changed[0]["ratios"])[1:]
    cells = [
        (
            row["change"],
            *(_number(row["ratios"][name], ".2f") for name in names),
            _number(row["rms_log_error"], ".3f"),
        )
        for row in changed
    ]
    console.print(_table(("change", *map(_first_word, names), "rms"), cells))


def _print_leave_one_out(console: Console) -> None:
    console.print(
        "\nEach model predicted by a fit (GPU, acceptance p, latency, efficiency) to the other four",
        style="bold",
    )
    points = grid()
    cells = [
        (
            row["model"],
            f"{row['card_ratio']:.1f}",
            f"{row['predicted']:.2f}",
            f"{row['error']:+.1%}",
            f"{row['gpu']}, p {row['acceptance']:g}, {row['layer_latency_us']:g} us, {row['efficiency']:.0%}",
        )
        for row in leave_one_out(points)
    ]
    table = _table(("model", "card", "predicted", "error", "the fit"), cells)
    table.columns[-1].justify = "left"
    console.print(table)
    good = sum(point.is_within_tolerance() for point in points)
    console.print(f"{good} of {len(points)} grid points are within {TOLERANCE:.0%} of all five ratios.")


def _print_published(console: Console, entries: Sequence[CardEntry], assumptions: Assumptions) -> None:
    console.print(
        "\nThe formula of arXiv 2507.19427 (no latency, memory or drafts), ratio to Step", style="bold"
    )
    cells = []
    for name in ("H800", "H20"):
        costs = [paper_cost(entry.model, CHIPS[name], assumptions.context).total for entry in entries]
        cells.append(
            (f"{name}, ${costs[0]:.3f}/M for Step", *(f"{cost / costs[0]:.2f}" for cost in costs[1:]))
        )
    console.print(_table(("GPU", *(_first_word(entry.model.name) for entry in entries[1:])), cells))
    console.print("\nPrefill operations relative to 64 sliding heads: the report, and counted", style="bold")
    cells = [
        (row["change"], _thousands(row["context"]), f"{row['report']:.2f}", f"{row['computed']:.3f}")
        for row in prefill_flops_tables()
    ]
    console.print(_table(("change", "context", "report", "counted"), cells))
    console.print(
        "\nEvery second layer full in the report's 30B ablation, from all layers full", style="bold"
    )
    cells = [
        (row["phase"], f"{row['all_full']:.2f}", f"{row['report']:.2f}", f"{row['computed']:.3f}")
        for row in ablation_table()
    ]
    console.print(_table(("operations", "all full", "report", "counted"), cells))
    console.print(
        "Its sizes are not public: how much a full layer costs is taken from the report's first column."
    )


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]], right: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if right and index else "left", no_wrap=not index)
    for row in cells:
        table.add_row(*row)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _first_word(name: str) -> str:
    return name.replace("-", " ").split()[0]


def _thousands(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else f"{context:,}"
