"""How fast this machine reads memory and multiplies matrices, in a few seconds.

Reading is `kernels.ops.measure_bandwidth`; multiplying is square matrices in the types that models use, of which the
best round counts: a busy machine only makes one slower. Rates are bytes a second, and operations a second with a
multiply-add counted as two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stepflash.kernels import ops

READ_BYTES = 2**30
GEMM_SIZE = 1024
ROUND_SECONDS = 0.8  # spent on each measurement, so that the whole stays far below fifteen seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one device; a rate is None where the type is not supported."""

    device: str
    num_threads: int
    memory_bytes: int
    available_bytes: int
    bandwidth: float
    gemm_rates: dict[str, float | None]


def measure_cpu(
    seconds: float = ROUND_SECONDS, read_bytes: int = READ_BYTES, size: int = GEMM_SIZE
) -> Measured:
    """The processor with torch's current number of threads; the buffer shrinks to an eighth of what is free."""
    total, available = system_memory()
    return Measured(
        device="cpu",
        num_threads=torch.get_num_threads(),
        memory_bytes=total,
        available_bytes=available,
        bandwidth=ops.measure_bandwidth(min(read_bytes, available // 8 // 4 * 4)),
        gemm_rates=_gemm_rates("cpu", size, seconds),
    )


def measure_cuda(index: int = 0, seconds: float = ROUND_SECONDS) -> Measured:
    """One CUDA device."""
    device = f"cuda:{index}"
    available, total = torch.cuda.mem_get_info(index)
    return Measured(
        device=torch.cuda.get_device_name(index),
        num_threads=torch.get_num_threads(),
        memory_bytes=total,
        available_bytes=available,
        bandwidth=ops.measure_bandwidth(min(4 * READ_BYTES, available // 16 * 4), device=device),
        gemm_rates=_gemm_rates(device, 8 * GEMM_SIZE, seconds),
    )


def gemm_rate(device: str, dtype: torch.dtype, size: int, seconds: float = ROUND_SECONDS) -> float | None:
    """Operations a second of a product of two square matrices; None if torch cannot multiply the type here."""
    if dtype == torch.int8:
        a = torch.randint(-8, 8, (size, size), dtype=dtype, device=device)
        product = lambda: torch._int_mm(a, a)  # noqa: E731
    else:
        a = torch.randn(size, size, device=device).to(dtype)
        product = lambda: a @ a  # noqa: E731
    try:
        best = _best_seconds(product, seconds, device)
    except (RuntimeError, NotImplementedError):
        return None
    return 2 * size**3 / best


def system_memory() -> tuple[int, int]:
    """Physical memory and what of it is available, in bytes."""
    import os

    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    try:
        available = page * os.sysconf("SC_AVPHYS_PAGES")
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        available = total // 2
    return total, min(total, available)


def _gemm_rates(device: str, size: int, seconds: float) -> dict[str, float | None]:
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    return {name: gemm_rate(device, dtype, size, seconds) for name, dtype in types.items()}


def _best_seconds(work: Callable[[], object], seconds: float, device: str) -> float:
    """The fastest of as many runs as fit, at least two after a first that warms up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    end = time.perf_counter() + seconds
    runs = [once(), once()]
    while time.perf_counter() < end:
        runs.append(once())
    return min(runs)
