"""ggml's quantised blocks to float32, vectorised over rows.

Each format is a fixed-size record: small integers and the float16 scales of a block of 32 or 256 elements. The
layouts are those of ggml's public `ggml-common.h`; every formula multiplies in the order of ggml's reference, so
results are equal to it bit for bit (tests/weights/test_dequantize.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stepflash.gguf_file import GGML_TYPES, TYPE_IDS

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(raw: Tensor, type_name: str) -> Tensor:
    """Decode rows of blocks.

    Args:
        raw: uint8 [num_rows, row_bytes], each row a whole number of blocks.
        type_name: a key of `DEQUANTIZERS` or of `PLAIN_DTYPES`.
    Returns:
        float32 [num_rows, row_elements].
    """
    if type_name in PLAIN_DTYPES:
        return raw.contiguous().view(PLAIN_DTYPES[type_name]).float()
    block_bytes = GGML_TYPES[TYPE_IDS[type_name]].block_bytes
    blocks = raw.reshape(-1, block_bytes)  # [num_blocks, block_bytes]
    return DEQUANTIZERS[type_name](blocks).reshape(raw.shape[0], -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: float32 [num_blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2, n]: all low nibbles, then all high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _q8_0(blocks: Tensor) -> Tensor:
    """d (2 bytes), 32 int8."""
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    """d (2), 16 bytes: elements 0-15 in the low nibbles, 16-31 in the high ones; 8 is zero."""
    values = _nibbles(blocks[:, 2:]).flatten(1).to(torch.int8) - 8
    return _half(blocks, 0) * values.float()


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes: two uint8 [num_blocks, 8].

    Bytes 0-3 and 4-7 hold the first four of each in their low 6 bits; bytes 8-11 hold the low 4 bits of the last
    four of both, whose upper 2 bits are the top bits of bytes 0-7.
    """
    first, second, last = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (last & 15) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 63, (last >> 4) | (second >> 6 << 4)), dim=1)
    return scales, minima


def _k_blocks(blocks: Tensor, values: Tensor) -> Tensor:
    """d * scale * value - dmin * minimum, per sub-block of 32; values uint8 [num_blocks, 8, 32]."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()  # [num_blocks, 8]
    return scales[:, :, None] * values.float() - minima[:, :, None]


def _q4_k(blocks: Tensor) -> Tensor:
    """d, dmin (2 + 2), 12 bytes of scales, 4 x 32 bytes: each holds a sub-block low and the next one high."""
    return _k_blocks(blocks, _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes before the nibbles: bit j of byte l is the fifth bit of element l, sub-block j."""
    low = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 16:48].unsqueeze(1) >> bits) & 1  # [num_blocks, 8, 32]
    return _k_blocks(blocks, low | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    """ql (128), qh (64), 16 int8 scales, d (2); two halves of 128 elements, each four groups of 32.

    In a half, ql has 64 bytes: low nibbles are groups 0 and 1, high ones groups 2 and 3. Byte l of qh has two
    more bits for element l of each group. 32 is zero; a scale serves 16 elements.
    """
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts) & 3  # [num_blocks, 2, 4, 32]
    values = (low | (high << 4)).to(torch.int8) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()  # [num_blocks, 16]
    return scales[:, :, None] * values.view(-1, 16, 16).float()


DEQUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
