"""The Triton kernels against the references. Triton decides at its import whether kernels are interpreted, and may
already be imported here: the cases run in a process of their own, on the CUDA device or else in the interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (`pip install triton`; CUDA builds of torch bring it)",
)


def compiled() -> dict[str, str]:
    """The environment without the interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@needs_triton
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_kernels(marks: str) -> None:
    on_device = torch.cuda.is_available()
    environment = compiled() | ({} if on_device else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks, str(CASES)]
    command += ["-W", "default"] if on_device else []  # the compiler warns of its own settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels with an assembler are Linux ones")
def test_every_launch_compiles_for_a_gpu_that_is_not_here() -> None:
    command = [sys.executable, "-m", "tests.kernels.triton_compile", "90"]
    done = subprocess.run(
        command, cwd=CASES.parents[2], capture_output=True, text=True, check=False, env=compiled()
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("for sm_90\n")


def test_importing_the_ops_does_not_import_triton() -> None:
    code = "import sys, stepflash.kernels.ops; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_benchmark_needs_a_device_and_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"],
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device")


def test_the_checks_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU's kernels; a kernel that is wrong is found."""
    from benchmarks.gpu import SMALL, check
    from stepflash.kernels import ops
    from stepflash.kernels.formats import Format

    torch.manual_seed(0)
    assert check(SMALL, [Format.BF16, Format.INT4_G32], "cpu") == []
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args: right(*args) * 1.01)
    found = check(SMALL, [Format.BF16], "cpu")
    assert len(found) == 4
    assert all("q_proj bf16" in sentence for sentence in found)
