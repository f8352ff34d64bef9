"""Packed formats: every layout gives back its values; GGUF blocks against a scalar decoder written from the spec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.kernels.formats import (
    Format,
    pack_bf16,
    pack_fp8,
    pack_groups,
    pack_q4_k,
    pack_q6_k,
    pack_q8_0,
    packed_bytes,
    parse_format,
    quantize,
    quantize_fp8,
    quantize_groups,
    unpack,
)

INTEGER_FORMATS = [f for f in Format if f.is_int8 or f.is_int4]


@settings(max_examples=30)
@given(
    n=st.integers(1, 70), k=st.integers(1, 300), fmt=st.sampled_from(INTEGER_FORMATS), seed=st.integers(0, 99)
)
def test_integer_layouts_return_their_codes(n: int, k: int, fmt: Format, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-127, 128) if fmt.is_int8 else (-8, 8)
    codes = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, -(-k // fmt.group), generator=generator).to(torch.float16)
    packed = pack_groups(codes, scales, fmt)
    expected = codes.float() * scales.float().repeat_interleave(fmt.group, 1)[:, :k]
    assert packed.numel() == packed_bytes(fmt, n, k)
    assert torch.equal(unpack(packed, fmt, n, k), expected)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 32), (33, 70), (64, 256)])
def test_bf16_is_exact(n: int, k: int) -> None:
    weight = torch.randn(n, k).bfloat16()
    packed = pack_bf16(weight)
    assert packed.numel() == packed_bytes(Format.BF16, n, k)
    assert torch.equal(unpack(packed, Format.BF16, n, k), weight.float())


@pytest.mark.parametrize(("n", "k"), [(128, 128), (130, 300), (40, 5)])
def test_fp8_keeps_every_code_and_block_scale(n: int, k: int) -> None:
    codes = torch.randint(0, 255, (n, k), dtype=torch.uint8)
    codes[codes == 127] = 0  # NaN
    weight = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(-(-n // 128), -(-k // 128))
    expected = weight.float() * scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    packed = pack_fp8(weight, scales)
    assert packed.numel() == packed_bytes(Format.FP8, n, k)
    assert torch.equal(unpack(packed, Format.FP8, n, k), expected)


def _half(raw: np.ndarray) -> float:
    return float(raw.copy().view(np.float16)[0])


def _decode_q4_k(block: np.ndarray) -> list[float]:
    """One block of 256 by ggml's layout, a value at a time."""
    d, dmin, six, quants = (
        _half(block[0:2]),
        _half(block[2:4]),
        block[4:16].astype(int),
        block[16:].astype(int),
    )
    values = []
    for i in range(256):
        sub = i // 32
        if sub < 4:
            scale, minimum = six[sub] & 63, six[sub + 4] & 63
        else:
            scale = (six[sub + 4] & 15) | (six[sub - 4] >> 6) << 4
            minimum = (six[sub + 4] >> 4) | (six[sub] >> 6) << 4
        byte = quants[i // 64 * 32 + i % 32]
        values.append(d * scale * (byte >> 4 if i % 64 >= 32 else byte & 15) - dmin * minimum)
    return values


def _decode_q6_k(block: np.ndarray) -> list[float]:
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8)
    d = _half(block[208:210])
    values = []
    for i in range(256):
        half, quarter, at = i // 128, i % 128 // 32, i % 32
        nibble = low[half * 64 + (quarter % 2) * 32 + at] >> (4 if quarter >= 2 else 0) & 15
        bits = high[half * 32 + at] >> 2 * quarter & 3
        values.append(d * int(scales[i // 16]) * ((nibble | bits << 4) - 32))
    return values


def _decode_q8_0(block: np.ndarray) -> list[float]:
    return [_half(block[:2]) * int(q) for q in block[2:].view(np.int8)]


def _random_blocks(n: int, num_blocks: int, size: int, halves: tuple[int, ...]) -> torch.Tensor:
    raw = torch.randint(0, 256, (n, num_blocks, size), dtype=torch.uint8)
    for at in halves:
        raw[..., at : at + 2] = torch.rand(n, num_blocks, 1).to(torch.float16).view(torch.uint8)
    return raw


@pytest.mark.parametrize(
    ("pack", "decode", "fmt", "values", "size", "halves"),
    [
        (pack_q4_k, _decode_q4_k, Format.Q4_K, 256, 144, (0, 2)),
        (pack_q6_k, _decode_q6_k, Format.Q6_K, 256, 210, (208,)),
        (pack_q8_0, _decode_q8_0, Format.INT8_G32, 32, 34, (0,)),
    ],
)
def test_gguf_blocks(pack, decode, fmt, values, size, halves) -> None:
    n, k = 35, 512
    raw = _random_blocks(n, k // values, size, halves)
    expected = torch.tensor([[v for block in row for v in decode(block)] for row in raw.numpy()]).float()
    packed = pack(raw.flatten(1), k)
    assert torch.allclose(unpack(packed, fmt, n, k), expected, rtol=1e-6, atol=2e-4)
    rows_of_panels = 64  # 35 rows are stored as two panels of 32
    assert packed.numel() * 8 / (rows_of_panels * k) == size * 8 / values  # no larger than the file


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("int8", 0.008),
        ("int8_g32", 0.006),
        ("int4", 0.085),
        ("int4_g128", 0.11),
        ("fp8", 0.03),
        ("bf16", 0.002),
    ],
)
def test_quantisation_error_of_gaussian_weights(name: str, bound: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    fmt = parse_format(name, 512)
    error = unpack(quantize(weight, fmt), fmt, 64, 512) - weight
    assert error.norm() / weight.norm() < bound


def test_int4_search_is_no_worse_than_the_plain_scale() -> None:
    torch.manual_seed(1)
    weight = torch.randn(8, 64)
    codes, scales = quantize_groups(weight, 4, 32)
    best = (codes.view(8, 2, 32) * scales.float()[..., None] - weight.view(8, 2, 32)).square().sum()
    groups = weight.view(8, 2, 32)
    plain_scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / plain_scale).round().clamp(-8, 7) * plain_scale - groups).square().sum()
    assert best < plain


def test_zero_weights_stay_zero() -> None:
    for fmt in (Format.INT4_G32, Format.INT8_G128, Format.FP8, Format.BF16):
        assert torch.equal(unpack(quantize(torch.zeros(33, 300), fmt), fmt, 33, 300), torch.zeros(33, 300))


def test_experts_are_packed_one_by_one() -> None:
    weight = torch.randn(3, 40, 64)
    packed = quantize(weight, Format.INT4_G32)
    assert packed.shape == (3, packed_bytes(Format.INT4_G32, 40, 64))
    assert torch.equal(unpack(packed, Format.INT4_G32, 40, 64)[1], unpack(packed[1], Format.INT4_G32, 40, 64))


def test_names() -> None:
    assert parse_format("int8", 512) == Format.INT8_G128
    assert parse_format("int8", 384) == Format.INT8_G64
    assert parse_format("int8", 64) == Format.INT8_G32
    assert parse_format("int4", 2816) == Format.INT4_G32
    assert Format.INT4_G32.bits_per_weight <= 4.6
    with pytest.raises(ValueError, match=r"int5.*known"):
        parse_format("int5", 64)
    with pytest.raises(ValueError, match="GGUF"):
        quantize(torch.zeros(32, 256), Format.Q4_K)
    with pytest.raises(ValueError, match="scales are"):
        pack_groups(torch.zeros(4, 64, dtype=torch.int8), torch.zeros(4, 1), Format.INT8_G32)
    with pytest.raises(ValueError, match="fp8 scales"):
        pack_fp8(*[quantize_fp8(torch.zeros(128, 256))[0], torch.zeros(1, 1)])
