"""`stepflash doctor`: is the installation whole, how fast is this machine, and what may a model reach on it.

Measures for a few seconds, checks what the fast paths need, and hands the measured bandwidth to the planner.
The expectation is a ceiling from what was measured just now, so it is as good as the machine was quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from stepflash.errors import StepflashError
from stepflash.tools.hardware import Machine, show_bytes
from stepflash.tools.plan import Plan, Request, plans, recommend
from stepflash.tools.plan_command import BUILT_IN, load_config

if TYPE_CHECKING:
    from stepflash.tools.measure import Measured

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "llguidance",
    "huggingface-hub",
    "rich",
    "fastapi",
    "uvicorn",
    "pydantic",
    "httpx",
    "prometheus-client",
    "cryptography",
)
CACHE_BYTES = 256 << 20  # as much as the last-level caches of today's processors hold, or more
STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. `error`: stepflash does not work; `warning`: it works, slower or in part."""

    check: str
    level: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepflash doctor`."""
    parser.add_argument(
        "model",
        nargs="?",
        default=BUILT_IN,
        metavar="MODEL",
        help=f"what to expect of this model here (default: the released {BUILT_IN})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the findings; 1 if something that stepflash needs is missing."""
    config = load_config(options.model)
    findings = check_installation()
    measured: list[Measured] = []
    if not any(f.level == "error" and f.check == "torch" for f in findings):
        import torch

        from stepflash.tools.measure import measure_cpu, measure_cuda

        measured.append(measure_cpu())
        if torch.cuda.is_available():
            measured.append(measure_cuda())
    request = Request(
        context=min(Request().context, config.max_position_embeddings), with_mtp=config.num_mtp_layers > 0
    )
    expectations = []
    for result in measured:
        candidates = plans(config, options.model, machine_of(result), request)
        expectations.append((result, candidates, recommend(machine_of(result), candidates)))
    if options.json:
        report = {
            "findings": [asdict(finding) for finding in findings],
            "measured": [asdict(result) for result in measured],
            "model": options.model,
            "request": asdict(request),
            "expectations": [
                {
                    "device": result.device,
                    "recommended": best.format if best else None,
                    "plans": [plan.to_json() for plan in candidates],
                }
                for result, candidates, best in expectations
            ],
        }
        print(json.dumps(report))
    else:
        _print_report(findings, expectations, options.model, request)
    return 1 if any(finding.level == "error" for finding in findings) else 0


def machine_of(measured: Measured) -> Machine:
    """The machine that the planner sees: all memory, measured bandwidth and BF16 rate (float32 where faster)."""
    rates = [rate for name, rate in measured.gemm_rates.items() if rate and name != "int8"]
    return Machine(
        name=f"this machine, {measured.device}",
        kind="cpu" if measured.device == "cpu" else "gpu",
        memory_bytes=measured.memory_bytes,
        bandwidth=measured.bandwidth,
        bf16_rate=max(rates, default=None),
    )


def check_installation() -> list[Finding]:
    """Versions, compiler, native kernels, the built-in model, and whether the machine is quiet."""
    findings = [
        Finding(check="python", level="ok", detail=f"{platform.python_version()} on {platform.machine()}")
    ]
    for package in PACKAGES:
        try:
            findings.append(Finding(check=package, level="ok", detail=metadata.version(package)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(check=package, level="error", detail=f"missing: pip install {package}"))
    findings += [_check_kernels(), _check_nano(), _check_load()]
    return findings


def _check_kernels() -> Finding:
    """Whether the compiled kernels are there; does not compile them."""
    check = "native kernels"
    if os.environ.get("STEPFLASH_NATIVE") == "0":
        return Finding(check=check, level="warning", detail="switched off by STEPFLASH_NATIVE=0")
    try:
        from stepflash.kernels import build
    except ImportError as error:
        return Finding(check=check, level="error", detail=str(error))
    supported = build.machine_isas()
    if not supported:
        detail = "none for this processor (they need x86-64 with AVX2); the PyTorch references run"
        return Finding(check=check, level="warning", detail=detail)
    compiler = build.find_compiler()
    if compiler is None:
        detail = "no C++ compiler: install g++ or clang++, or set CXX; the PyTorch references run"
        return Finding(check=check, level="warning", detail=detail)
    library = build.library_path(supported[-1:], compiler)
    if not library.exists():
        detail = (
            f"not compiled yet for {supported[-1]}; {compiler} does it at first use, or now: "
            "python -m stepflash.kernels.build"
        )
        return Finding(check=check, level="warning", detail=detail)
    if not build.load():
        return Finding(
            check=check, level="warning", detail=f"{library} does not load; delete it to build it again"
        )
    return Finding(check=check, level="ok", detail=f"{build.loaded_isa()}, compiled")


def _check_nano() -> Finding:
    from stepflash.weights.hub import resolve_model

    try:
        return Finding(check="nano", level="ok", detail=str(resolve_model("nano")))
    except StepflashError as error:
        return Finding(check="nano", level="warning", detail=str(error))


def _check_load() -> Finding:
    count = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    detail = f"load {load:.1f} on {count} processors"
    if load > 0.5 * count:
        return Finding(
            check="quiet", level="warning", detail=f"{detail}: others work too, the rates below are too low"
        )
    return Finding(check="quiet", level="ok", detail=detail)


def _print_report(
    findings: list[Finding],
    expectations: list[tuple[Measured, list[Plan], Plan | None]],
    model: str,
    request: Request,
) -> None:
    from rich.console import Console

    console = Console(highlight=False)

    def line(label: str, text: str, style: str = "") -> None:
        console.print(f"{label:<22}{text}", style=style, markup=False, soft_wrap=True)

    for finding in findings:
        line(finding.check, finding.detail, "" if finding.level == "ok" else STYLES[finding.level])
    for measured, candidates, best in expectations:
        console.print()
        line("device", f"{measured.device}, {measured.num_threads} threads", "bold")
        free = f"{show_bytes(measured.memory_bytes)}, {show_bytes(measured.available_bytes)} available"
        line("memory", free)
        line("reads", f"{measured.bandwidth / 1e9:.1f} GB/s")
        for name, rate in measured.gemm_rates.items():
            line(f"multiplies {name}", "not supported here" if rate is None else _show_rate(rate))
        _print_expectation(line, candidates, best, model, request)


def _print_expectation(
    line: Any, candidates: list[Plan], best: Plan | None, model: str, request: Request
) -> None:
    if best is None:
        smallest = min(candidates, key=lambda plan: plan.device_bytes)
        reason = smallest.limit.reason if smallest.limit else "no format"
        line(model, f"does not fit, even in {smallest.format}: {reason}", "yellow")
        return
    fitting = sum(plan.fits for plan in candidates)
    line(model, f"fits in {fitting} of {len(candidates)} formats; expect at most, in {best.format}:")
    for ceiling in best.ceilings:
        line(
            "",
            f"{ceiling.tokens_per_second:.1f} tok/s with {_count(ceiling.num_drafts, 'draft')} at"
            f" {request.context:,} tokens (bound by {ceiling.bound}"
            + (f", {request.acceptance:.0%} of drafts accepted)" if ceiling.num_drafts else ")"),
        )
    if best.ceilings and best.ceilings[0].bytes_per_step < CACHE_BYTES:
        line(
            "",
            f"a step reads only {show_bytes(best.ceilings[0].bytes_per_step)}: what stays in the processor's cache"
            " is faster than these bounds of the memory",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _show_rate(rate: float) -> str:
    return f"{rate / 1e12:.2f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"
