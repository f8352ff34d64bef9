"""Peak memory of `stepflash quantize` on a random model whose layers have the released shapes.

    python benchmarks/quantize_memory.py FOLDER [--layers 3] [--experts 288] [--tokens 4096] [--format int4-g128]

Writes the model into FOLDER/model (bf16, shards of 1 GiB: about 9 GB a layer), quantises it with nearest and
calibrated rounding, compares the two models on a short text as the receipt does, and prints the peak resident memory
(VmHWM of the process) at the end of every file and of all. The status is 1 if random weights agree too little. What
is there already is kept: an interrupted run goes on. Only the first layer is dense: few layers show what sparse ones
need.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from stepflash.weights.random_checkpoint import Size, write_random_checkpoint

DOCUMENT = 255  # bytes, a token each; one more begins a document


def released_size(layers: int, experts: int) -> Size:
    """The released layers, only fewer; no prediction modules, which are dense and rounded like any tensor."""
    return Size(
        hidden=4096, layers=layers, dense=1, experts=experts, top_k=8, expert_inter=1280, shared_inter=1280,
        inter=11264, heads=64, sliding_heads=96, kv_heads=8, head_dim=128, window=512, vocab=128896, context=262144,
        rope_original=131072, mtp=0,
    )  # fmt: skip


def write_calibration(path: Path, num_tokens: int) -> None:
    letters = random.Random(0)
    texts = [
        "".join(letters.choices("etaoin shrdlu", k=DOCUMENT)) for _ in range(num_tokens // (DOCUMENT + 1))
    ]
    path.write_text("\n---\n".join(texts), encoding="utf-8")


def peak_mib(pid: int) -> int | None:
    """VmHWM of a process; None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)


def run(model: Path, out: Path, options: list[str]) -> None:
    """Quantise in a process of its own and print its peak whenever a file is done."""
    command = [sys.executable, "-m", "stepflash", "quantize", str(model), str(out), *options]
    print(" ".join(command[2:]), flush=True)
    start, peak, seen = time.monotonic(), 0, {path.name for path in out.glob("*.safetensors")}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(1)
            peak = peak_mib(process.pid) or peak
            for path in sorted(out.glob("model-*.safetensors")):
                if path.name not in seen:
                    seen.add(path.name)
                    print(f"{path.name}: {peak} MiB peak, {time.monotonic() - start:.0f} s", flush=True)
    print(f"status {process.returncode}: {peak} MiB peak, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=288)
    parser.add_argument("--tokens", type=int, default=4096, help="to calibrate on (%(default)s)")
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--rounding", nargs="*", choices=("nearest", "gptq"), default=["nearest", "gptq"])
    options = parser.parse_args()
    model = options.folder / "model"
    if not (model / "model.safetensors.index.json").is_file():
        count = write_random_checkpoint(model, released_size(options.layers, options.experts))
        print(f"{model}: {count / 1e9:.2f} billion parameters", flush=True)
    write_calibration(options.folder / "calibration.txt", options.tokens)
    write_calibration(options.folder / "text.txt", DOCUMENT + 1)
    for rounding in options.rounding:
        extra = ["--calibration", str(options.folder / "calibration.txt")] if rounding == "gptq" else []
        common = ["--format", options.format, "--edge", "none", "--rounding", rounding]
        common += ["--text", str(options.folder / "text.txt")]
        run(model, options.folder / rounding, [*common, *extra])


if __name__ == "__main__":
    main()
