"""`stepflash plan`: the planner's answer as tables, or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from stepflash.tools.architectures import RELEASED_CONFIG
from stepflash.tools.hardware import MACHINES, Machine, parse_quantity, show_bytes
from stepflash.tools.plan import SPLIT_COUNTS, SPLITS, Plan, Request, plans, recommend, splits
from stepflash.tools.serving_commands import commands
from stepflash.tools.weight_formats import FORMATS, sizes, without_mtp

if TYPE_CHECKING:
    from rich.console import Console

BUILT_IN = "step-3.5-flash"
RELEASED = (BUILT_IN, "stepfun-ai/Step-3.5-Flash", "stepfun-ai/Step-3.5-Flash-FP8")  # one configuration
KV_DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}
DEFAULTS = Request()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepflash plan`."""
    parser.add_argument(
        "model",
        nargs="?",
        default=BUILT_IN,
        metavar="MODEL",
        help=f"a folder, config.json, .gguf, hub id or nano (default: the released {BUILT_IN})",
    )
    machine = parser.add_argument_group("machine", "all presets are compared if none is given")
    machine.add_argument("--machine", metavar="PRESET", help=", ".join(MACHINES))
    machine.add_argument("--memory", metavar="SIZE", help="of each device, such as 128GB")
    machine.add_argument("--bandwidth", metavar="RATE", help="of its memory, such as 273GB/s")
    machine.add_argument("--gpus", type=int, metavar="N", help="the devices are N GPUs of that memory")
    wanted = parser.add_argument_group("what is wanted of it")
    wanted.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of each stream ({DEFAULTS.context}, or as many as the model has)",
    )
    wanted.add_argument(
        "--streams", type=int, default=DEFAULTS.streams, metavar="N", help="at the same time (%(default)s)"
    )
    wanted.add_argument(
        "--format", metavar="FORMAT", help=f"{', '.join(FORMATS)}; the best that fits if not given"
    )
    wanted.add_argument("--kv-dtype", choices=sorted(KV_DTYPES), default="bf16", help="(%(default)s)")
    wanted.add_argument(
        "--acceptance",
        type=float,
        default=DEFAULTS.acceptance,
        metavar="P",
        help="assumed for each draft after accepted ones (%(default)s)",
    )
    wanted.add_argument("--no-mtp", action="store_true", help="leave the prediction modules out")
    wanted.add_argument("--split", choices=("auto", *SPLITS), default="auto", help="over several devices")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the plan; 1 if nothing fits."""
    config = load_config(options.model)
    request = Request(
        context=min(DEFAULTS.context, config.max_position_embeddings)
        if options.context is None
        else options.context,
        streams=options.streams,
        kv_dtype=KV_DTYPES[options.kv_dtype],
        acceptance=options.acceptance,
        with_mtp=not options.no_mtp and config.num_mtp_layers > 0,
        split=options.split,
    )
    chosen = _machine(options)
    machines = [chosen] if chosen else list(MACHINES.values())
    answers = []
    for machine in machines:
        candidates = plans(config, options.model, machine, request, options.format)
        answers.append((machine, candidates, recommend(machine, candidates)))
    command_model = None if options.model in RELEASED else options.model
    if options.json:
        report = {
            "model": options.model,
            "request": asdict(request),
            "machines": [
                {
                    "machine": asdict(machine),
                    "plans": [plan.to_json() for plan in candidates],
                    "recommended": best.format if best else None,
                    "commands": [asdict(c) for c in commands(config, best, machine, request, command_model)]
                    if best
                    else [],
                }
                for machine, candidates, best in answers
            ],
        }
        print(json.dumps(report))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        _print_model(console, config, options.model, request)
        if chosen:
            _print_machine(console, config, answers[0], request, command_model)
        else:
            _print_presets(console, config, answers, request)
    return 0 if any(best for _, _, best in answers) else 1


def load_config(model: str) -> ModelConfig:
    """The configuration alone: of the built-in copy, a file, a folder, or one small file of a hub model.

    Raises:
        ConfigError, WeightsError: there is none.
    """
    if model in RELEASED:
        return ModelConfig.from_pretrained(RELEASED_CONFIG)
    path = Path(model).expanduser()
    if path.exists() or model == "nano":
        if path.is_file():
            return ModelConfig.from_pretrained(path)
        from stepflash.weights.hub import resolve_model

        return ModelConfig.from_pretrained(resolve_model(model))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _hub_config(model)
    raise ConfigError(f"{model!r} is neither a file, nor a folder, nor a hub id, nor {BUILT_IN!r}")


def _hub_config(repo: str) -> ModelConfig:
    import huggingface_hub
    from httpx import HTTPError

    try:
        file = huggingface_hub.hf_hub_download(repo, "config.json")
    except (OSError, ValueError, HTTPError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{repo}: its config.json could not be read from the hub: {first}") from error
    return ModelConfig.from_pretrained(file)


def _machine(options: argparse.Namespace) -> Machine | None:
    """The machine of the options; sizes given beside a preset replace the preset's."""
    if options.machine is not None and options.machine not in MACHINES:
        raise ConfigError(f"machine must be one of {', '.join(MACHINES)}, got {options.machine!r}")
    if options.gpus is not None and options.gpus < 1:
        raise ConfigError(f"gpus must be at least 1, got {options.gpus}")
    memory = parse_quantity(options.memory, "--memory") if options.memory else None
    bandwidth = parse_quantity(options.bandwidth, "--bandwidth") if options.bandwidth else None
    preset = MACHINES.get(options.machine)
    if preset is None and memory is None:
        if bandwidth is not None or options.gpus is not None:
            raise ConfigError("--bandwidth and --gpus need --memory SIZE or --machine PRESET")
        return None
    if preset is not None and memory is None and bandwidth is None and options.gpus is None:
        return preset
    size = memory if memory is not None else preset.memory_bytes if preset else 0.0
    speed = bandwidth if bandwidth is not None else preset.bandwidth if preset else None
    count = options.gpus or (preset.count if preset else 1)
    kind = "gpu" if options.gpus else (preset.kind if preset else "unified")
    label = f"{count}x {show_bytes(size)}" if count > 1 else show_bytes(size)
    return Machine(
        name=label + (f", {show_bytes(speed)}/s" if speed else ""),
        kind=kind,
        memory_bytes=size,
        bandwidth=speed,
        count=count,
        bf16_rate=preset.bf16_rate if preset else None,
    )


def _print_model(console: Console, config: ModelConfig, model: str, request: Request) -> None:
    total, active = config.num_parameters(), config.num_active_parameters()
    console.print(f"{model}: {total:,} parameters, {active:,} active for a token", style="bold")
    token = config.kv_bytes_per_token(request.kv_dtype)
    window = config.kv_bytes_per_sequence(request.kv_dtype)
    mtp = config.kv_bytes_per_sequence(request.kv_dtype, mtp=True) - window
    console.print(
        f"keys and values: {token / 1024:g} KiB a token + {window / 2**20:.4g} MiB a sequence"
        f" + {mtp / 2**20:.4g} MiB for prediction modules ({request.kv_dtype})"
    )
    console.print(
        f"wanted: {request.streams} x {request.context:,} tokens; drafts assumed accepted with"
        f" probability {request.acceptance:g}\n"
    )


def _print_machine(
    console: Console,
    config: ModelConfig,
    answer: tuple[Machine, list[Plan], Plan | None],
    request: Request,
    command_model: str | None,
) -> None:
    machine, candidates, best = answer
    speed = f"{show_bytes(machine.bandwidth)}/s" if machine.bandwidth else "bandwidth not given: no ceilings"
    console.print(
        f"{machine.name}: {machine.count} x {show_bytes(machine.usable_bytes)} usable ({machine.reserve}), {speed}",
        style="bold",
    )
    table = _table("format", "weights", "device", "fits", "longest", "streams", "tok/s", "drafting")
    for plan in candidates:
        table.add_row(
            plan.format,
            show_bytes(plan.weight_bytes + plan.mtp_bytes),
            show_bytes(plan.device_bytes),
            f"no: {plan.limit.quantity}" if plan.limit else "yes",
            f"{plan.max_context:,}",
            f"{plan.max_streams:,}",
            *_speeds(plan),
        )
    console.print(table)
    console.print(
        "weights: with prediction modules; device: weights and its part of"
        f" {show_bytes(candidates[0].kv_bytes)} of keys and values; longest: context for these streams; streams:"
        " of this context",
        style="dim",
    )
    for plan in candidates:
        if plan.limit:
            console.print(f"{plan.format}: refused, {plan.limit.reason}", style="red", markup=False)
    if best is None:
        console.print("\nNothing fits.", style="bold red")
        return
    _print_ceilings(console, best, request)
    if machine.count > 1:
        _print_splits(console, config, best)
    console.print(f"\nTo run it ({best.format})", style="bold")
    for command in commands(config, best, machine, request, command_model):
        console.print(f"# {command.engine}: {command.note}", style="dim", markup=False, soft_wrap=True)
        console.print(command.line, markup=False, soft_wrap=True)


def _print_ceilings(console: Console, best: Plan, request: Request) -> None:
    if not best.ceilings:
        return
    console.print(f"\nCeilings of {best.format} at {request.context:,} tokens", style="bold")
    table = _table("drafts", "tokens a step", "read a step", "bound by", "tok/s", "tok/s a stream")
    for ceiling in best.ceilings:
        table.add_row(
            str(ceiling.num_drafts),
            f"{ceiling.tokens_per_step:.2f}",
            show_bytes(ceiling.bytes_per_step),
            ceiling.bound,
            _speed(ceiling.tokens_per_second),
            _speed(ceiling.tokens_per_second_per_stream),
        )
    console.print(table)
    console.print(
        "Upper bounds: every byte once at full bandwidth, no latency, no communication. Verified tokens are taken "
        "to pick experts independently, 1 - (1 - k/E)^n of them; real tokens share more, so drafts read less."
    )


def _print_splits(console: Console, config: ModelConfig, best: Plan) -> None:
    console.print(f"\nSplits of {best.format}", style="bold")
    table = _table("devices", "split", "legal", "why", right=False)
    counts = sorted({best.split.count, *(n for n in SPLIT_COUNTS if n <= max(8, best.split.count))})
    for count in counts:
        for split in splits(config, FORMATS[best.format], count):
            table.add_row(
                str(count),
                split.kind,
                "yes" if split.is_legal else "no",
                "; ".join(split.reasons) or "divides evenly",
            )
    console.print(table)
    console.print(
        "tensor: experts by columns; expert: whole experts, attention by heads; layers: one after the other."
    )


def _print_presets(
    console: Console,
    config: ModelConfig,
    answers: Sequence[tuple[Machine, list[Plan], Plan | None]],
    request: Request,
) -> None:
    weights = _table("format", "weights", "with modules", "note")
    weights.columns[-1].justify, weights.columns[-1].no_wrap = "left", False
    for fmt in FORMATS.values():
        stored = sizes(config, fmt)
        total = show_bytes(stored.trunk + stored.mtp)
        weights.add_row(fmt.name, show_bytes(sizes(without_mtp(config), fmt).trunk), total, fmt.note)
    console.print(weights)
    console.print()
    table = _table("machine", "format", "split", "longest", "streams", "tok/s", "drafting")
    for machine, candidates, best in answers:
        if best is None:
            smallest = min(candidates, key=lambda plan: plan.device_bytes)
            reason = smallest.limit.reason if smallest.limit else ""
            table.add_row(machine.name, "none", "", "", "", "", "")
            console.print(
                f"{machine.name}: refused even in {smallest.format}, {reason}", style="red", markup=False
            )
            continue
        table.add_row(
            machine.name,
            best.format,
            best.split.kind,
            f"{best.max_context:,}",
            f"{best.max_streams:,}",
            *_speeds(best),
        )
    console.print(table)
    console.print(
        "tok/s: ceilings of all streams from memory bandwidth, first without drafts. `--machine PRESET` shows one."
    )


def _speeds(plan: Plan) -> tuple[str, str]:
    """Ceiling without drafts, and the best with drafts and their number."""
    if not plan.ceilings:
        return "-", "-"
    best = max(plan.ceilings, key=lambda ceiling: ceiling.tokens_per_second)
    with_drafts = f"{_speed(best.tokens_per_second)} ({best.num_drafts})" if best.num_drafts else "-"
    return _speed(plan.ceilings[0].tokens_per_second), with_drafts


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second < 100 else f"{tokens_per_second:,.0f}"


def _table(*columns: str, right: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if right and index else "left", no_wrap=right)
    return table
