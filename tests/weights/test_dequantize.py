"""Quantised blocks: golden (the `gguf` package, bit for bit) and brute force, one element at a time."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.gguf_file import GGML_TYPES, TYPE_IDS
from stepflash.weights.dequantize import DEQUANTIZERS, dequantize

GOLDEN = (
    Path(__file__).parents[1] / "fixtures" / "gguf" / "dequantized.npz"
)  # made by make_golden.py beside it


def half(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block, np.float16, 1, at)[0])


def scalar_q8_0(block: bytes) -> list[np.float32]:
    return [half(block, 0) * np.float32(struct.unpack_from("b", block, 2 + i)[0]) for i in range(32)]


def scalar_q4_0(block: bytes) -> list[np.float32]:
    nibbles = [block[2 + i] % 16 for i in range(16)] + [block[2 + i] // 16 for i in range(16)]
    return [half(block, 0) * np.float32(nibble - 8) for nibble in nibbles]


def scale_and_minimum(packed: bytes, j: int) -> tuple[int, int]:
    """The j-th 6-bit pair, as ggml's get_scale_min_k4 reads it."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, (packed[j + 4] >> 4) | (packed[j] >> 6) << 4


def scalar_k(block: bytes, nibbles_at: int, fifth_bits_at: int | None) -> list[np.float32]:
    values = []
    for i in range(256):
        sub_block, element = divmod(i, 32)
        byte = block[nibbles_at + 32 * (sub_block // 2) + element]
        quant = byte >> 4 if sub_block % 2 else byte & 15
        if fifth_bits_at is not None and block[fifth_bits_at + element] & (1 << sub_block):
            quant += 16
        scale, minimum = scale_and_minimum(block[4:16], sub_block)
        wide = (half(block, 0) * np.float32(scale)) * np.float32(quant)
        values.append(wide - half(block, 2) * np.float32(minimum))
    return values


def scalar_q6_k(block: bytes) -> list[np.float32]:
    values = []
    for i in range(256):
        part, within = divmod(i, 128)
        group, element = divmod(within, 32)
        byte = block[64 * part + 32 * (group % 2) + element]
        low = byte & 15 if group < 2 else byte >> 4
        high = (block[128 + 32 * part + element] >> (2 * group)) & 3
        scale = struct.unpack_from("b", block, 192 + i // 16)[0]
        values.append((half(block, 208) * np.float32(scale)) * np.float32((low | high << 4) - 32))
    return values


SCALAR = {
    "Q8_0": scalar_q8_0,
    "Q4_0": scalar_q4_0,
    "Q4_K": lambda block: scalar_k(block, 16, None),
    "Q5_K": lambda block: scalar_k(block, 48, 16),
    "Q6_K": scalar_q6_k,
}


def test_every_format_is_tested() -> None:
    assert set(SCALAR) == set(DEQUANTIZERS)


@pytest.mark.parametrize("name", SCALAR)
def test_equals_the_gguf_package_bit_for_bit(name: str) -> None:
    with np.load(GOLDEN) as arrays:
        raw, wanted = arrays[f"{name}_raw"], arrays[name]
    found = dequantize(torch.from_numpy(raw), name).numpy()
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("name", SCALAR)
@settings(max_examples=15)
@given(data=st.data())
def test_equals_the_scalar_reading_of_the_layout(name: str, data: st.DataObject) -> None:
    size = GGML_TYPES[TYPE_IDS[name]].block_bytes
    block = data.draw(st.binary(min_size=size, max_size=size))
    with np.errstate(all="ignore"):  # random bytes make NaN and infinite scales too
        wanted = np.array(SCALAR[name](block), np.float32)
    found = dequantize(torch.frombuffer(bytearray(block), dtype=torch.uint8)[None], name).numpy()
    np.testing.assert_array_equal(found[0], wanted)


def test_plain_types() -> None:
    values = torch.tensor([[1.0, -2.5, 3e-5]])
    for name, dtype in {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.items():
        stored = values.to(dtype)
        assert torch.equal(dequantize(stored.view(torch.uint8), name), stored.float())
