"""Chips and machines as data: memory, bandwidth and peak rates from the vendors' datasheets.

The planner and the decode-cost model share these numbers; nothing here is fitted or measured. Dense rates
(no sparsity) in operations a second, a multiply-add counted as two; GB are 10^9 bytes. Prices are the rents
an hour that arXiv 2507.19427 assumes; they enter absolute cost only, never a ratio on one kind of chip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stepflash.errors import ConfigError

GB = 10**9
UNIFIED_RESERVE_BYTES = 7 * GB  # what the model's README gives as the overhead of running the int4 model
UNIFIED_RESERVE_SHARE = 0.25  # of a machine that is too small for that reserve to make sense
GPU_USABLE_FRACTION = 0.9  # the default of vLLM's --gpu-memory-utilization
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One accelerator. `link` is the bandwidth to its neighbours in the node, one direction, bytes a second."""

    name: str
    memory_bytes: float
    bandwidth: float
    bf16_rate: float
    fp8_rate: float
    link: float
    dollars_per_hour: float | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="H20",
            memory_bytes=96 * GB,
            bandwidth=4.0e12,
            bf16_rate=148e12,
            fp8_rate=296e12,
            link=450e9,
            dollars_per_hour=0.80,
        ),
        Chip(
            name="H800",
            memory_bytes=80 * GB,
            bandwidth=3.35e12,
            bf16_rate=989e12,
            fp8_rate=1979e12,
            link=200e9,
            dollars_per_hour=2.00,
        ),
        Chip(
            name="H100",
            memory_bytes=80 * GB,
            bandwidth=3.35e12,
            bf16_rate=989e12,
            fp8_rate=1979e12,
            link=450e9,
        ),
        Chip(
            name="H200",
            memory_bytes=141 * GB,
            bandwidth=4.8e12,
            bf16_rate=989e12,
            fp8_rate=1979e12,
            link=450e9,
        ),
        # No FP8 units: 8-bit weights are multiplied at the BF16 rate.
        Chip(
            name="A800",
            memory_bytes=80 * GB,
            bandwidth=2.0e12,
            bf16_rate=312e12,
            fp8_rate=312e12,
            link=200e9,
            dollars_per_hour=0.75,
        ),
        Chip(
            name="910B",
            memory_bytes=64 * GB,
            bandwidth=1.6e12,
            bf16_rate=280e12,
            fp8_rate=280e12,
            link=196e9,
            dollars_per_hour=0.67,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Something to run a model on: `count` equal devices, each with its own memory and bandwidth.

    kind: `gpu` (CUDA, discrete memory), `unified` (CPU and GPU share it) or `cpu`.
    """

    name: str
    kind: str
    memory_bytes: float
    bandwidth: float | None
    count: int = 1
    bf16_rate: float | None = None

    @property
    def usable_bytes(self) -> float:
        """What a model may fill on one device."""
        if self.kind == "gpu":
            return self.memory_bytes * GPU_USABLE_FRACTION
        return self.memory_bytes - min(UNIFIED_RESERVE_BYTES, UNIFIED_RESERVE_SHARE * self.memory_bytes)

    def memory_for(self, num_bytes: float) -> float:
        """The memory of which so much would be usable: the inverse of `usable_bytes`."""
        if self.kind == "gpu":
            return num_bytes / GPU_USABLE_FRACTION
        return min(num_bytes + UNIFIED_RESERVE_BYTES, num_bytes / (1 - UNIFIED_RESERVE_SHARE))

    @property
    def reserve(self) -> str:
        """Why `usable_bytes` is less than the memory."""
        if self.kind == "gpu":
            return f"{1 - GPU_USABLE_FRACTION:.0%} of each GPU kept for activations and the runtime"
        return f"{show_bytes(self.memory_bytes - self.usable_bytes)} kept for the system and the runtime"


def _gpus(chip: str, count: int) -> Machine:
    data = CHIPS[chip]
    return Machine(
        name=f"{count}x {chip}",
        kind="gpu",
        memory_bytes=data.memory_bytes,
        bandwidth=data.bandwidth,
        count=count,
        bf16_rate=data.bf16_rate,
    )


MACHINES = {
    # Apple M4 Max (128 GB) 546 GB/s, M3 Ultra 819 GB/s; NVIDIA GB10 273 GB/s; AMD Ryzen AI Max+ 395 256 GB/s.
    "mac-studio-128": Machine(
        name="Mac Studio 128 GB", kind="unified", memory_bytes=128 * GB, bandwidth=546e9
    ),
    "mac-studio-256": Machine(
        name="Mac Studio 256 GB", kind="unified", memory_bytes=256 * GB, bandwidth=819e9
    ),
    "mac-studio-512": Machine(
        name="Mac Studio 512 GB", kind="unified", memory_bytes=512 * GB, bandwidth=819e9
    ),
    "dgx-spark": Machine(name="DGX Spark 128 GB", kind="unified", memory_bytes=128 * GB, bandwidth=273e9),
    "strix-halo": Machine(name="Strix Halo 128 GB", kind="unified", memory_bytes=128 * GB, bandwidth=256e9),
    "h100": _gpus("H100", 1),
    "h200": _gpus("H200", 1),
    "4xh100": _gpus("H100", 4),
    "8xh100": _gpus("H100", 8),
    "8xh800": _gpus("H800", 8),
    "8xh20": _gpus("H20", 8),
    "8xh200": _gpus("H200", 8),
    # Two channels of DDR5-5600, and twelve of DDR5-4800.
    "cpu-desktop": Machine(name="Desktop CPU 128 GB", kind="cpu", memory_bytes=128 * GB, bandwidth=89.6e9),
    "cpu-server": Machine(name="Server CPU 384 GB", kind="cpu", memory_bytes=384 * GB, bandwidth=460.8e9),
}


def parse_quantity(text: str, what: str) -> float:
    """`128GB`, `111.5 GiB`, `273GB/s` or plain bytes, as bytes (a second).

    Raises:
        ConfigError: naming `what` and the accepted form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?(?:/S|PS)?", text.strip().upper())
    if not match or match[2] == "I" or float(match[1]) == 0:
        raise ConfigError(f"{what} must be a positive number with a unit such as 128GB, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def show_bytes(count: float) -> str:
    """Bytes in decimal units, as memory is sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"
