"""The doctor: measured rates against torch itself, findings, and the expectation that follows from them."""

import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepflash.cli import main
from stepflash.kernels import build, ops
from stepflash.tools import doctor, measure
from stepflash.tools.measure import Measured

MICRO = str(Path(__file__).parents[1] / "fixtures" / "micro")
SMALL = Measured(
    device="cpu",
    num_threads=2,
    memory_bytes=24 * 10**9,
    available_bytes=8 * 10**9,
    bandwidth=20e9,
    gemm_rates={"float32": 1e11, "bfloat16": 2e12, "int8": None},
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure.measure_cpu(seconds=0.01, read_bytes=2**22, size=64)
    monkeypatch.setattr(measure, "measure_cpu", lambda: measured)
    monkeypatch.setattr(build, "load", lambda: True)
    monkeypatch.setattr(build, "loaded_isa", lambda: "avx2")
    monkeypatch.delenv("STEPFLASH_NATIVE", raising=False)


def test_rates_are_work_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each run takes one reading of the clock before and one after; the runs below take 4, 3, 0.5 and 2 seconds.
    # The first only warms up, the loop ends when the clock passes 100.
    readings = iter([0, 4, 10, 20, 23, 30, 30.5, 31, 40, 42, 200])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(readings))
    assert measure._best_seconds(lambda: None, seconds=90, device="cpu") == 0.5
    monkeypatch.setattr(measure, "_best_seconds", lambda work, seconds, device: 0.5)
    assert measure.gemm_rate("cpu", torch.float32, 10) == 2 * 10**3 / 0.5


def test_measuring_really_reads_and_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    monkeypatch.setattr(measure, "_best_seconds", lambda work, seconds, device: results.append(work()) or 1.0)
    measure.gemm_rate("cpu", torch.int8, 32)
    assert results[0].shape == (32, 32)
    assert results[0].dtype == torch.int32


def test_bandwidth_is_bytes_over_the_median_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    readings = iter([0, 4, 10, 11, 20, 22])  # three passes of 4, 1 and 2 seconds
    monkeypatch.setattr(ops, "stream_read", lambda buffer: passes.append(buffer.numel()))
    monkeypatch.setattr(ops.time, "perf_counter", lambda: next(readings))
    assert ops.measure_bandwidth(4096, repeats=3) == 2048
    assert passes == [4096] * 4  # the first one only warms up


def test_gemm_rate_of_an_unsupported_type_is_none() -> None:
    assert measure.gemm_rate("cpu", torch.bool, 8, seconds=0.0) is None
    assert measure.gemm_rate("cpu", torch.float32, 32, seconds=0.0)


def test_memory_is_plausible() -> None:
    total, available = measure.system_memory()
    assert 2**28 < available <= total < 2**50


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", MICRO, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {finding["check"]: finding for finding in report["findings"]}
    assert {"python", "torch", "tokenizers", "native kernels", "nano", "quiet"} <= set(checks)
    assert checks["torch"]["detail"] == torch.__version__
    (measured,) = report["measured"]
    assert measured["bandwidth"] > 0
    assert set(measured["gemm_rates"]) == {"float32", "bfloat16", "int8"}
    (expectation,) = report["expectations"]
    assert expectation["recommended"] == "q8_0"  # tiny, so the best that llama.cpp runs
    best = next(plan for plan in expectation["plans"] if plan["format"] == "q8_0")
    assert (
        best["ceilings"][0]["tokens_per_second"]
        <= measured["bandwidth"] / best["ceilings"][0]["bytes_per_step"] * 1.0001
    )


def test_doctor_text_says_why_the_full_model_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure_cpu", lambda: SMALL)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "does not fit, even in q4_k_s: weights 113.0 GB > 18.0 GB usable of 24.0 GB" in out
    assert "20.0 GB/s" in out
    assert "2.00 TFLOP/s" in out
    assert "not supported here" in out


def test_small_models_may_beat_the_bounds_of_the_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(
        SMALL,
        memory_bytes=512 * 10**9,
        available_bytes=500 * 10**9,
        gemm_rates={**SMALL.gemm_rates, "bfloat16": None},
    )
    monkeypatch.setattr(measure, "measure_cpu", lambda: large)
    assert main(["doctor", "nano"]) == 0
    out = capsys.readouterr().out
    assert "with 1 draft at" in out
    assert "stays in the processor's cache is faster than these bounds" in out
    assert main(["doctor"]) == 0
    assert "processor's cache" not in capsys.readouterr().out


def test_every_dependency_is_checked() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert [re.split("[<>=]", entry)[0] for entry in project["dependencies"]] == list(doctor.PACKAGES)


def test_missing_package_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "stepflash-missing-package"))
    assert main(["doctor", MICRO, "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    missing = next(f for f in findings if f["check"] == "stepflash-missing-package")
    assert missing["level"] == "error"
    assert "pip install stepflash-missing-package" in missing["detail"]


def test_kernel_findings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def finding() -> tuple[str, str]:
        found = doctor._check_kernels()
        return found.level, found.detail

    monkeypatch.setattr(build, "machine_isas", lambda: ("avx2",))
    monkeypatch.setattr(build, "find_compiler", lambda: sys.executable)
    monkeypatch.setattr(build, "library_path", lambda isas, compiler: tmp_path / "kernels.so")
    level, detail = finding()
    assert level == "warning"
    assert "not compiled yet for avx2" in detail
    (tmp_path / "kernels.so").touch()
    assert finding() == ("ok", "avx2, compiled")
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert "no C++ compiler" in finding()[1]
    monkeypatch.setattr(build, "machine_isas", lambda: ())
    assert "none for this processor" in finding()[1]
    monkeypatch.setenv("STEPFLASH_NATIVE", "0")
    assert "STEPFLASH_NATIVE=0" in finding()[1]
