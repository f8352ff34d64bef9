"""The quantising kernel: the bytes of the reference in torch, whatever the shape, the numbers and the threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepflash.kernels import formats, ops
from stepflash.kernels.formats import Format, unpack
from tests.kernels.conftest import opcheck

INTEGER_FORMATS = [f for f in Format if f.is_int8 or f.is_int4]
NUMBERS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    # Rounding decides most where many entries lie between two codes.
    "few values": lambda shape, g: torch.randint(-9, 10, shape, generator=g) / 16.0,
    "zeros": lambda shape, g: torch.zeros(shape),
    "negative zeros": lambda shape, g: -torch.zeros(shape),
    "mostly zeros": lambda shape, g: torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.02),
    # Their scales are denormal or zero in float16, and the numbers denormal in float32.
    "tiny": lambda shape, g: torch.randn(shape, generator=g) * 10.0 ** torch.randint(-44, -3, shape, generator=g),
    # The largest that have a scale; some of the candidates of int4 are infinite.
    "huge": lambda shape, g: (torch.rand(shape, generator=g) - 0.5) * 2 * 8 * 65504,
    "outliers": lambda shape, g: torch.randn(shape, generator=g) * torch.rand(shape, generator=g) ** -2,
}  # fmt: skip


def check(weight: Tensor, fmt: Format) -> None:
    assert torch.equal(ops.quantize(weight, fmt), formats.quantize(weight, fmt))


@settings(max_examples=150)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    fmt=st.sampled_from(INTEGER_FORMATS),
    numbers=st.sampled_from(sorted(NUMBERS)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 999),
)
def test_bytes_are_those_of_the_reference(
    n: int, k: int, fmt: Format, numbers: str, dtype: torch.dtype, seed: int
) -> None:
    weight = NUMBERS[numbers]((n, k), torch.Generator().manual_seed(seed))
    limit = 6e4 if dtype == torch.float16 else 5e5
    check(weight.clamp(-limit, limit).to(dtype), fmt)


@pytest.mark.parametrize("fmt", INTEGER_FORMATS, ids=lambda fmt: fmt.name)
def test_threads_views_and_experts(fmt: Format) -> None:
    whole = torch.randn(300, 900, generator=torch.Generator().manual_seed(1))
    check(whole, fmt)
    check(whole.T, fmt)
    check(whole[3:200:2, 5:700], fmt)
    check(whole.view(3, 100, 900), fmt)
    assert ops.quantize(whole[:0], fmt).numel() == 0
    alone = ops.quantize(whole, fmt)
    torch.set_num_threads(2)
    assert torch.equal(ops.quantize(whole, fmt), alone)


@pytest.mark.parametrize("fmt", INTEGER_FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e9, -3e38])
@pytest.mark.parametrize("where", [(0, 0), (33, 100), (39, 299)])
def test_what_has_no_scale_is_refused(fmt: Format, value: float, where: tuple[int, int]) -> None:
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(2))
    weight[where] = value
    for quantize in (ops.quantize, formats.quantize):
        with pytest.raises(ValueError, match="NaN, infinite or too large"):
            quantize(weight, fmt)


def test_the_chosen_scale_is_the_best_of_the_nineteen() -> None:
    """Brute force in double precision, group by group."""
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    values = unpack(ops.quantize(weight, Format.INT4_G32), Format.INT4_G32, 5, 64)
    for row, rounded in zip(weight.double(), values.double(), strict=True):
        for group, got in zip(row.split(32), rounded.split(32), strict=True):
            peak = max(group.tolist(), key=abs)
            errors = []
            for step in range(-9, 10):
                scale = torch.tensor(peak / (-8 + 0.15 * step)).half().double()
                codes = (group / scale).round().clamp(-8, 7)
                errors.append(float((codes * scale - group).square().sum()))
            assert float((got - group).square().sum()) <= min(errors) * (1 + 1e-5)


def test_the_op_as_torch_sees_it() -> None:
    opcheck(torch.ops.stepflash.quantize.default, (torch.randn(3, 40, 70), int(Format.INT4_G64)))
    with pytest.raises(RuntimeError, match="neither int8 nor int4"):
        torch.ops.stepflash.quantize(torch.randn(4, 4), int(Format.FP8))
    with pytest.raises(ValueError, match="GGUF"):
        ops.quantize(torch.zeros(32, 256), Format.Q4_K)
