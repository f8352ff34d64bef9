"""The memory that PyTorch's own products keep: one compiled primitive for every number of rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import stepflash.kernels
import torch
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
weight = torch.zeros(32, 64, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.zeros(8, 64, dtype=torch.bfloat16), weight)
before = resident()
for num_rows in range(9, 409):
    torch.nn.functional.linear(torch.zeros(num_rows, 64, dtype=torch.bfloat16), weight)
print(resident() - before)
"""


def run(code: str, **environment: str) -> str:
    known = {k: v for k, v in os.environ.items() if not k.endswith("_CACHE_CAPACITY")}
    known |= {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=known, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of resident pages")
def test_products_of_400_sizes_keep_little_memory() -> None:
    """Measured with PyTorch 2.13 on AVX-512: 61 MB; 257 MB without the bound."""
    assert int(run(MEASURE)) < 110e6


def test_the_users_own_bounds_stay() -> None:
    code = "import os, stepflash.kernels; print(os.environ['LRU_CACHE_CAPACITY'])"
    assert run(code, LRU_CACHE_CAPACITY="7") == "7"
    assert run(code) == "64"
