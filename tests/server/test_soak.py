"""Many clients at once, well and badly behaved: `benchmarks/soak.py`, shortened."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def soak(seconds: int, clients: int, max_open_answers: int) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--seconds", str(seconds), "--clients", str(clients)]
    command += ["--max-open-answers", str(max_open_answers)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "streams compared" in result.stdout


def test_a_few_seconds() -> None:
    soak(6, clients=12, max_open_answers=10)


@pytest.mark.slow
def test_a_minute() -> None:
    soak(60, clients=64, max_open_answers=56)
