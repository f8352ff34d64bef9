"""Damaged headers, configurations, indices and receipts, 3,300 of them: no crash, no hang, no runaway allocation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepflash.cli import main
from stepflash.tools.conversion import convert

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is read from /proc")
MICRO = Path(__file__).parents[1] / "fixtures" / "micro"


@pytest.mark.parametrize(
    ("kind", "count"),
    [("gguf", 1000), ("safetensors", 1000), ("config", 500), ("index", 500), ("receipt", 300)],
)
def test_damaged_checkpoints_end_cleanly(tmp_path: Path, kind: str, count: int) -> None:
    source = MICRO
    if kind == "gguf":
        source = tmp_path / "m.gguf"
        convert(MICRO, source, "gguf", "bf16")
    if kind == "receipt":
        source = tmp_path / "packed"
        assert main(["quantize", str(MICRO), str(source), "--format", "int8"]) in (0, 1)
    command = [sys.executable, "-m", "tests.weights.fuzz", kind, str(source), str(count), "11"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=MICRO.parents[2])
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert report["refused"] > count * 0.4, report
    assert report["different"] > 50, report
    assert report["slowest_cpu_seconds"] < 5, report
