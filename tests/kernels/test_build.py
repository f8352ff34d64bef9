"""Building: found again by hash, built once by many, clear when it cannot; and every instruction set agrees."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stepflash.kernels import build

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


RUN_AN_OP = """
import logging; logging.basicConfig()
import torch
from stepflash.kernels import build, ops
x = torch.randn(3, 64)
a, b = ops.rms_norm(x, torch.zeros(64), 1e-5), ops.rms_norm(x, torch.zeros(64), 1e-5)
assert torch.allclose(a, x / x.square().mean(-1, keepdim=True).add(1e-5).sqrt(), atol=1e-6)
print(build.loaded_isa())
"""


def test_native_is_loaded_by_the_first_op() -> None:
    done = python(RUN_AN_OP)
    assert done.stdout.strip() in build.ISA_FLAGS, done.stderr


def test_the_environment_switches_native_off() -> None:
    done = python(RUN_AN_OP, STEPFLASH_NATIVE="0")
    assert (done.stdout.strip(), done.stderr) == ("None", "")


def test_without_a_compiler_the_references_run_and_it_is_said_once(tmp_path: Path) -> None:
    done = python(RUN_AN_OP, PATH=str(tmp_path), CXX="", STEPFLASH_CACHE=str(tmp_path))
    assert done.stdout.strip() == "None", done.stderr
    assert done.stderr.count("no C++ compiler found: install g++ or clang++") == 1


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bindings.cpp", "dispatch.cpp"):
        (tmp_path / name).write_text("int main() { return surely_undeclared; }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    monkeypatch.setenv("STEPFLASH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="surely_undeclared"):
        build.build()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_many_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def slow_compile(isas: tuple[str, ...], compiler: str, target: Path) -> None:
        calls.append(target)
        time.sleep(0.2)
        target.write_text("library")

    monkeypatch.setattr(build, "_compile", slow_compile)
    monkeypatch.setenv("STEPFLASH_CACHE", str(tmp_path))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.build())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert found == calls * 6


def test_the_name_follows_sources_and_instruction_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    compiler = build.find_compiler()
    assert compiler is not None
    first = build.library_path(("avx2",), compiler)
    assert build.library_path(("avx2",), compiler) == first
    assert build.library_path(("avx512",), compiler) != first
    (tmp_path / "a.cpp").write_text("int b;")
    assert build.library_path(("avx2",), compiler) != first


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_lesser_instruction_sets_pass_the_same_tests(isa: str) -> None:
    if isa not in build.machine_isas():
        pytest.skip(f"this processor has no {isa}")
    files = [f"tests/kernels/test_{name}.py" for name in ("linear", "moe", "attention")]
    env = os.environ | {"STEPFLASH_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-k", "not opcheck", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:]
    loaded = python("from stepflash.kernels import build; print(build.loaded_isa())", STEPFLASH_ISA=isa)
    assert loaded.stdout.strip() == isa
