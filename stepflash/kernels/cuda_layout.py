"""How packed weights lie on a CUDA device: the same codes and scales as in `formats.py`, in the order in which a
warpgroup multiplies them.

int8, int4, fp8: tiles of 2 KiB, 64 rows by 32 columns (int4: 64 columns), a row of tiles after the other. Thread t
of 128 holds bytes 16 t and up, which are its share of a matrix instruction: row 16 (t / 32) + t / 4 % 8 + 8 r and
column 16 s + 8 h + 2 (t % 4) + p is byte s h r p, most significant first, the order of its registers. int4: of word
s h of 32 bits nibble p q r, q being 1 for the second 32 columns: a shift and a mask give a pair of columns.
Scales follow: of every step of two groups the scales of all rows, the two float16 of a row side by side; of fp8 a
float32 for every 128 columns and 64 rows.

bf16: rows one after the other, columns padded to 32. Q4_K and Q6_K stay as they are: no kernel reads them here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepflash.kernels.formats import Format, packed_bytes

ROWS, TILE_BYTES = 64, 2048


def is_supported(fmt: Format) -> bool:
    return fmt not in (Format.Q4_K, Format.Q6_K)


def _ceil(x: int, multiple: int) -> int:
    return -(-x // multiple)


def padded(fmt: Format, n: int, k: int) -> tuple[int, int]:
    """Rows and columns with the padding that they have in tiles."""
    rows = n if fmt == Format.BF16 else _ceil(n, ROWS) * ROWS
    return rows, _ceil(k, fmt.k_block) * fmt.k_block


def num_code_bytes(fmt: Format, n: int, k: int) -> int:
    """Bytes before the scales."""
    rows, columns = padded(fmt, n, k)
    return rows * columns * 2 if fmt == Format.BF16 else rows * columns // (2 if fmt.is_int4 else 1)


def num_bytes(fmt: Format, n: int, k: int) -> int:
    """Bytes of an [n, k] weight, a multiple of 64; for whole tiles those of `packed_bytes`, but for fp8's padding."""
    rows, columns = padded(fmt, n, k)
    scales = 0
    if fmt == Format.FP8:
        scales = _ceil(rows // ROWS * (columns // 128) * 4, 64) * 64
    elif fmt != Format.BF16:
        scales = rows * (columns // fmt.group) * 2
    return num_code_bytes(fmt, n, k) + scales


def from_panels(packed: Tensor, fmt: Format, n: int, k: int) -> Tensor:
    """A packed weight of `formats.py`, uint8 [..., packed_bytes] on any device -> [..., num_bytes] as above."""
    if not is_supported(fmt):
        return packed
    flat = packed.reshape(-1, packed_bytes(fmt, n, k))
    out = torch.zeros((flat.shape[0], num_bytes(fmt, n, k)), dtype=torch.uint8, device=packed.device)
    for one, target in zip(flat, out, strict=True):  # one matrix at a time: a copy of all would not fit
        _from_panels(one, target, fmt, n, k)
    return out.view(*packed.shape[:-1], -1)


def to_panels(tiles: Tensor, fmt: Format, n: int, k: int) -> Tensor:
    """Inverse of `from_panels`."""
    if not is_supported(fmt):
        return tiles
    flat = tiles.reshape(-1, num_bytes(fmt, n, k))
    out = torch.zeros((flat.shape[0], packed_bytes(fmt, n, k)), dtype=torch.uint8, device=tiles.device)
    for one, target in zip(flat, out, strict=True):
        _to_panels(one, target, fmt, n, k)
    return out.view(*tiles.shape[:-1], -1)


def _from_panels(packed: Tensor, out: Tensor, fmt: Format, n: int, k: int) -> None:
    rows, columns = padded(fmt, n, k)
    panels, end = _ceil(n, 32), num_code_bytes(fmt, n, k)
    codes_out, scales_out = out[:end], out[end:]
    if fmt == Format.BF16:
        values = packed.view(torch.bfloat16).view(panels, columns // 2, 2, 16, 2).permute(0, 2, 3, 1, 4)
        codes_out.view(torch.bfloat16).view(n, columns).copy_(values.reshape(-1, columns)[:n])
        return
    if fmt == Format.FP8:
        stored = packed.view(panels, -1)
        header = stored.shape[1] - columns * 32
        codes = stored[:, header:].reshape(panels, columns // 2, 4, 2, 4, 2).permute(0, 3, 2, 4, 1, 5)
        scales = stored[::2, :header].contiguous().view(torch.float32)[:, : columns // 128]
        flat = scales_out.view(torch.float32)
        flat[: scales.numel()].view(columns // 128, -1).copy_(scales.T)
    else:
        stored = packed.view(panels, columns // (2 * fmt.group), -1)
        halves = stored[:, :, :128].contiguous().view(torch.float16)  # [panels, steps, 2 * 32]
        target = scales_out.view(torch.float16).view(-1, rows, 2)
        target[:, : panels * 32].copy_(
            halves.view(panels, -1, 2, 32).permute(1, 0, 3, 2).reshape(-1, panels * 32, 2)
        )
        body = stored[:, :, 128:].reshape(panels, columns // 4, -1)
        if fmt.is_int4:
            codes = torch.stack([body & 15, body >> 4], 2).view(panels, -1, 2, 16, 4)
        else:
            codes = body.view(panels, -1, 2, 16, 4)
        codes = codes.permute(0, 2, 3, 1, 4)
    matrix = torch.full((rows, columns), _zero_code(fmt), dtype=torch.uint8, device=packed.device)
    matrix[: panels * 32] = codes.reshape(panels * 32, columns)
    codes_out.copy_(_tiles(matrix, fmt))


def _to_panels(tiles: Tensor, out: Tensor, fmt: Format, n: int, k: int) -> None:
    rows, columns = padded(fmt, n, k)
    panels, end = _ceil(n, 32), num_code_bytes(fmt, n, k)
    if fmt == Format.BF16:
        matrix = torch.zeros((panels * 32, columns), dtype=torch.bfloat16, device=tiles.device)
        matrix[:n] = tiles.view(torch.bfloat16).view(n, columns)
        pairs = matrix.view(panels, 2, 16, columns // 2, 2).permute(0, 3, 1, 2, 4)
        out.view(torch.bfloat16).view(pairs.shape).copy_(pairs)
        return
    codes = _untiled(tiles[:end], fmt, rows, columns)[: panels * 32]
    if fmt == Format.FP8:
        stored = out.view(panels, -1)
        header = stored.shape[1] - columns * 32
        scales = tiles[end:].view(torch.float32)[: rows // ROWS * (columns // 128)].view(columns // 128, -1)
        wide = torch.zeros((panels, header // 4), device=tiles.device)
        wide[:, : columns // 128] = scales.T.repeat_interleave(2, 0)[:panels]
        stored[:, :header] = wide.view(torch.uint8)
        lanes = codes.view(panels, 2, 4, 4, columns // 2, 2).permute(0, 4, 2, 1, 3, 5)
        stored[:, header:] = lanes.reshape(panels, -1)
        return
    stored = out.view(panels, columns // (2 * fmt.group), -1)
    halves = tiles[end:].view(torch.float16).view(-1, rows, 2)[:, : panels * 32]
    halves = halves.reshape(-1, panels, 32, 2).permute(1, 0, 3, 2).contiguous()  # [panels, steps, 2, 32]
    stored[:, :, :128] = halves.view(panels, -1, 64).view(torch.uint8)
    lanes = codes.view(panels, 2, 16, columns // 4, 4).permute(0, 3, 1, 2, 4)
    body = lanes[:, :, 0] | lanes[:, :, 1] << 4 if fmt.is_int4 else lanes
    stored[:, :, 128:] = body.reshape(panels, columns // (2 * fmt.group), -1)


def _zero_code(fmt: Format) -> int:
    return 0 if fmt == Format.FP8 else 0x08 if fmt.is_int4 else 0x80


def _tiles(matrix: Tensor, fmt: Format) -> Tensor:
    """Codes [rows, columns], uint8 -> bytes of their tiles."""
    rows, columns = matrix.shape
    planes = 2 if fmt.is_int4 else 1
    parts = matrix.view(rows // ROWS, 4, 2, 8, columns // (32 * planes), planes, 2, 2, 4, 2)
    #                   row tile, warp, r, lane / 4, column tile, plane, s, h, lane % 4, p
    if planes == 1:
        return parts.permute(0, 4, 5, 1, 3, 8, 6, 7, 2, 9).reshape(-1)
    nibbles = parts.permute(0, 4, 1, 3, 8, 6, 7, 9, 5, 2).reshape(-1, 2)
    return nibbles[:, 0] | nibbles[:, 1] << 4


def _untiled(tiles: Tensor, fmt: Format, rows: int, columns: int) -> Tensor:
    """Inverse of `_tiles`."""
    if not fmt.is_int4:
        parts = tiles.view(rows // ROWS, columns // 32, 4, 8, 4, 2, 2, 2, 2)
        return parts.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(rows, columns)
    parts = torch.stack([tiles & 15, tiles >> 4], -1).view(
        rows // ROWS, columns // 64, 4, 8, 4, 2, 2, 2, 2, 2
    )
    return parts.permute(0, 2, 9, 3, 1, 8, 5, 6, 4, 7).reshape(rows, columns)
