"""Packed test weights; native kernels are required here so that a silent fallback cannot pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stepflash.kernels import build
from stepflash.kernels.formats import Format, pack_q4_k, pack_q6_k, quantize


@pytest.fixture(scope="session", autouse=True)
def native() -> bool:
    if build.find_compiler() is None or not build.machine_isas():
        pytest.skip("no compiler or no supported processor: the references are all there is")
    return build.load()


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """torch's own checks of schema, autograd registration and fake kernel (its compiler test takes a minute)."""
    torch.library.opcheck(
        op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def random_packed(fmt: Format, n: int, k: int, seed: int = 0) -> Tensor:
    """A packed [n, k] weight of entries of about 1 / sqrt(k)."""
    generator = torch.Generator().manual_seed(seed)
    if fmt in (Format.Q4_K, Format.Q6_K):
        size, at = (144, (0, 2)) if fmt == Format.Q4_K else (210, (208,))
        blocks = -(-k // 256)
        raw = torch.randint(0, 256, (n, blocks, size), generator=generator, dtype=torch.uint8)
        for i in at:
            d = torch.rand(n, blocks, 1, generator=generator) * 1e-3 / k**0.5
            raw[..., i : i + 2] = d.to(torch.float16).view(torch.uint8)
        pack = pack_q4_k if fmt == Format.Q4_K else pack_q6_k
        return pack(raw.flatten(1), k)
    return quantize(torch.randn(n, k, generator=generator) / k**0.5, fmt)
