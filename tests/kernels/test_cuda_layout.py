"""Packed weights as CUDA kernels take them: where every byte is, as the module says it, and the way back."""

from __future__ import annotations

import pytest
import torch

from stepflash.kernels import cuda_layout
from stepflash.kernels.formats import Format, pack_fp8, pack_groups, packed_bytes

from .conftest import random_packed

FORMATS = [fmt for fmt in Format if cuda_layout.is_supported(fmt)]


def place(row: int, column: int, is_int4: bool = False) -> tuple[int, int]:
    """Byte of a tile of 64 rows that holds this weight, and its first bit there, by the words of `cuda_layout`."""
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    r, q, s, h, p = row // 8 % 2, column // 32, column // 16 % 2, column // 8 % 2, column % 2
    word = 16 * thread + 8 * s + 4 * h
    if is_int4:
        nibble = 4 * p + 2 * q + r
        return word + nibble // 2, nibble % 2 * 4
    return word + 2 * r + p, 0


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (40, 72), (96, 272), (192, 512)])
def test_there_and_back(fmt: Format, n: int, k: int) -> None:
    packed = torch.stack([random_packed(fmt, n, k, seed=seed).view(-1) for seed in range(2)])
    tiles = cuda_layout.from_panels(packed, fmt, n, k)
    assert tiles.shape == (2, cuda_layout.num_bytes(fmt, n, k))
    assert tiles.shape[1] % 64 == 0 or fmt == Format.BF16
    back = cuda_layout.to_panels(tiles, fmt, n, k)
    assert torch.equal(back, packed)
    assert torch.equal(cuda_layout.from_panels(packed[0], fmt, n, k), tiles[0])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_whole_tiles_take_no_more_room(fmt: Format) -> None:
    assert cuda_layout.num_bytes(fmt, 256, 2048) <= packed_bytes(fmt, 256, 2048)


@pytest.mark.parametrize("fmt", [Format.INT8_G32, Format.INT4_G32, Format.INT4_G128], ids=lambda f: f.name)
def test_codes_and_scales_are_where_they_should_be(fmt: Format) -> None:
    n, k = 128, 512
    low, high = (-8, 8) if fmt.is_int4 else (-127, 128)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, k // fmt.group, generator=generator).half()
    tiles = cuda_layout.from_panels(pack_groups(codes, scales, fmt), fmt, n, k)
    end = cuda_layout.num_code_bytes(fmt, n, k)
    width = 64 if fmt.is_int4 else 32
    for row, column in torch.randint(0, n, (200, 2), generator=generator).tolist():
        column *= 4  # all over the columns
        tile = row // 64 * (k // width) + column // width
        at, shift = place(row % 64, column % width, fmt.is_int4)
        code = int(tiles[tile * 2048 + at]) >> shift
        assert (code % 16 - 8 if fmt.is_int4 else code - 128) == codes[row, column]
    halves = tiles[end:].view(torch.float16)
    for row, group in ((0, 0), (127, 1), (70, k // fmt.group - 1)):
        assert halves[(group // 2 * n + row) * 2 + group % 2] == scales[row, group]


def test_blocks_of_fp8() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 384, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=generator)
    tiles = cuda_layout.from_panels(pack_fp8(weight, scales), Format.FP8, 256, 384)
    codes = weight.view(torch.uint8)
    for row, column in ((0, 0), (63, 31), (64, 32), (255, 383), (130, 200)):
        tile = row // 64 * (384 // 32) + column // 32
        assert tiles[tile * 2048 + place(row % 64, column % 32)[0]] == codes[row, column]
    stored = tiles[256 * 384 :].view(torch.float32)[: 3 * 4].view(3, 4)
    assert torch.equal(stored, scales.T.repeat_interleave(2, 1))


def test_formats_without_kernels_stay() -> None:
    packed = random_packed(Format.Q4_K, 32, 256)
    assert cuda_layout.from_panels(packed, Format.Q4_K, 32, 256) is packed
    assert cuda_layout.to_panels(packed, Format.Q4_K, 32, 256) is packed
