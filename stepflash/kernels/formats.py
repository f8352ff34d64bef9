"""Packed weight formats: from a matrix to the bytes that the kernels stream, and back.

A packed weight is one uint8 tensor, [num_bytes] or [num_experts, num_bytes]: panels of 32 output rows, each a
contiguous stream with its scales inside (csrc/formats.h draws it). `pack_*` are exact re-arrangements of
values that are already quantised; `quantize` rounds a float matrix first (the reference of `ops.quantize`);
`unpack` returns the values that a packed weight stands for. The kernels read the bytes as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32
NUM_SCALES = 19  # that are tried for a group of int4
UNFIT = "a weight is NaN, infinite or too large for a float16 scale"


class Format(IntEnum):
    """Codes as in csrc/formats.h and in quantised checkpoints: never renumber."""

    BF16 = 0
    FP8 = 1
    INT8_G32 = 2
    INT8_G64 = 3
    INT8_G128 = 4
    INT4_G32 = 5
    INT4_G64 = 6
    INT4_G128 = 7
    Q4_K = 8
    Q6_K = 9

    @property
    def group(self) -> int:
        """Consecutive k that share an activation scale; 0: activations are bf16."""
        return (0, 0, 32, 64, 128, 32, 64, 128, 32, 32)[self]

    @property
    def k_block(self) -> int:
        """K is padded with zeros to a multiple of this."""
        return (32, 128, 64, 128, 256, 64, 128, 256, 256, 256)[self]

    @property
    def is_int8(self) -> bool:
        return self in (Format.INT8_G32, Format.INT8_G64, Format.INT8_G128)

    @property
    def is_int4(self) -> bool:
        return self in (Format.INT4_G32, Format.INT4_G64, Format.INT4_G128)

    @property
    def bits_per_weight(self) -> float:
        """Including scales, without padding."""
        return (16.0, 8 + 32 / 128**2, 8.5, 8.25, 8.125, 4.5, 4.25, 4.125, 4.5, 6.5625)[self]


def parse_format(name: str, k: int) -> Format:
    """`bf16`, `fp8`, `int8`, `int4`, `int8_g64`, `int4_g128`, `q4_k`, ... for rows of k weights.

    `int8` takes the largest group that k fills without padding; `int4` is group 32 (4.5 bits a weight). `-` reads
    as `_`.

    Raises:
        ValueError: unknown name.
    """
    name = name.replace("-", "_")
    if name == "int8":
        return next(
            f
            for f in (Format.INT8_G128, Format.INT8_G64, Format.INT8_G32)
            if k % f.k_block == 0 or f.group == 32
        )
    if name == "int4":
        return Format.INT4_G32
    if name == "q8_0":
        return Format.INT8_G32
    try:
        return Format[name.upper()]
    except KeyError:
        raise ValueError(
            f"unknown weight format {name!r}; known: int8, int4, q8_0, {', '.join(f.name.lower() for f in Format)}"
        ) from None


def packed_bytes(fmt: Format, n: int, k: int) -> int:
    """Bytes of a packed [n, k] weight."""
    kp, panels = _round_up(k, fmt.k_block), -(-n // PANEL)
    if fmt == Format.BF16:
        return panels * kp * PANEL * 2
    if fmt == Format.FP8:
        return panels * (_round_up(kp // 128 * 4, 64) + kp * PANEL)
    if fmt == Format.Q4_K:
        return panels * (kp // 256) * 4608
    if fmt == Format.Q6_K:
        return panels * (kp // 256) * 6720
    return panels * (kp * PANEL // (2 if fmt.is_int4 else 1) + kp // fmt.group * PANEL * 2)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _pad(x: Tensor, rows: int, columns: int, value: float = 0) -> Tensor:
    if x.shape == (rows, columns):
        return x
    return F.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]), value=value)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _lanes(x: Tensor, per_lane: int) -> Tensor:
    """[panels * 32, k] -> [panels, k / per_lane, 2, 16, per_lane]: two vectors of sixteen rows per step."""
    panels = x.shape[0] // PANEL
    return x.view(panels, 2, 16, -1, per_lane).permute(0, 3, 1, 2, 4)


def _unlanes(x: Tensor) -> Tensor:
    """Inverse of `_lanes`."""
    panels, steps, _, _, per_lane = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(panels * PANEL, steps * per_lane)


# ---- bf16 and fp8 ----------------------------------------------------------------------------------------


def pack_bf16(weight: Tensor) -> Tensor:
    """[n, k] of any float type -> packed bf16."""
    n, k = weight.shape
    padded = _pad(weight.to(torch.bfloat16), _round_up(n, PANEL), _round_up(k, 32))
    return _bytes(_lanes(padded, 2)).flatten()


def _unpack_bf16(data: Tensor, panels: int, kp: int) -> Tensor:
    return _unlanes(data.view(torch.bfloat16).view(panels, kp // 2, 2, 16, 2)).float()


def pack_fp8(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """float8_e4m3fn [n, k] with float32 scales [ceil(n / 128), ceil(k / 128)] -> packed fp8, values unchanged."""
    n, k = weight.shape
    panels, kp = -(-n // PANEL), _round_up(k, 128)
    if scale_inv.shape != (-(-n // 128), kp // 128):
        raise ValueError(
            f"fp8 scales are {tuple(scale_inv.shape)}, a {n} x {k} weight needs {(-(-n // 128), kp // 128)}"
        )
    codes = _pad(weight.view(torch.uint8), panels * PANEL, kp)
    # 128-bit lane L of a vector: rows 4L..4L+3 then rows 16+4L..16+4L+3, two k each
    data = codes.view(panels, 2, 4, 4, kp // 2, 2).permute(0, 4, 2, 1, 3, 5).reshape(panels, -1)
    scales = scale_inv.float().repeat_interleave(128 // PANEL, 0)[:panels]
    header = _pad(scales, panels, _round_up(kp // 128, 16))
    return torch.cat([_bytes(header).view(panels, -1), data], 1).flatten()


def _unpack_fp8(data: Tensor, panels: int, kp: int) -> Tensor:
    rows = data.view(panels, -1)
    header = _round_up(kp // 128 * 4, 64)
    scales = rows[:, :header].contiguous().view(torch.float32)[:, : kp // 128]
    codes = (
        rows[:, header:]
        .reshape(panels, kp // 2, 4, 2, 4, 2)
        .permute(0, 3, 2, 4, 1, 5)
        .reshape(panels * PANEL, kp)
    )
    values = codes.contiguous().view(torch.float8_e4m3fn).float()
    return values * scales.repeat_interleave(PANEL, 0).repeat_interleave(128, 1)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] -> float8_e4m3fn [n, k] and float32 scales per 128 x 128 block, so that the peak maps to 448.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    n, k = weight.shape
    rows, columns = -(-n // 128), -(-k // 128)
    padded = _pad(weight.float(), rows * 128, columns * 128)
    blocks = padded.view(rows, 128, columns, 128)
    scales = (blocks.abs().amax((1, 3)) / 448.0).clamp_min(1e-12)
    if not bool(scales.isfinite().all()):
        raise ValueError("a weight is NaN or infinite")
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(rows * 128, columns * 128)
    return codes[:n, :k].contiguous(), scales


# ---- int8 and int4, one float16 scale per group ------------------------------------------------------------


def quantize_groups(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of [n, k] by groups along k: int8 codes [n, kp] and float16 scales [n, kp / group].

    weight ~= code * scale, codes in [-8, 7] or [-127, 127]; the scales of 4 bits are those of `search_scale`.

    Raises:
        ValueError: a weight is NaN, infinite or too large for a float16 scale.
    """
    n, k = weight.shape
    groups = _pad(weight.float(), n, _round_up(k, group)).view(n, -1, group)
    if bits == 4:
        scales = search_scale(groups)
        return round_groups(groups, scales, -8, 7).to(torch.int8).view(n, -1), scales
    scales = (groups.abs().amax(-1) / 127.0).to(torch.float16) + 0.0
    if not bool(scales.isfinite().all()):
        raise ValueError(UNFIT)
    return round_groups(groups, scales, -127, 127).to(torch.int8).view(n, -1), scales


def search_scale(groups: Tensor, importance: Tensor | None = None) -> Tensor:
    """float16 scales [...] of groups [..., group] for codes in [-8, 7], never -0.

    Of 19 scales around the one that maps the signed peak to -8, the first with the least squared error. Errors are
    added in the order that csrc/quantize.cpp uses, so that both choose alike.

    Args:
        importance: of each weight's squared error, broadcasting against the groups.
    Raises:
        ValueError: a weight is NaN, infinite or too large for a float16 scale.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    peak = torch.where(high > -low, high, low)
    best = torch.zeros_like(peak, dtype=torch.float16)
    best_error = torch.full_like(peak, torch.inf)
    for step in range(NUM_SCALES):
        scales = (peak / (-8.0 + 0.15 * (step - NUM_SCALES // 2))).to(torch.float16) + 0.0
        errors = round_groups(groups, scales, -8, 7).mul_(scales.float()[..., None]).sub_(groups).square_()
        error = _sum_of_group(errors if importance is None else errors.mul_(importance))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scales, best)
    if not bool(best_error.isfinite().all()):
        raise ValueError(UNFIT)
    return best


def _sum_of_group(x: Tensor) -> Tensor:
    """Sum over the last dimension: entries j, j + 8, j + 16, ... one after the other, then those eight in halves."""
    padded = F.pad(x, (0, -x.shape[-1] % 8))
    columns = padded.view(*padded.shape[:-1], -1, 8)
    total: Tensor = columns[..., 0, :].clone()
    for i in range(1, columns.shape[-2]):
        total += columns[..., i, :]
    for count in (4, 2, 1):
        total = total[..., :count] + total[..., count:]
    return total.squeeze(-1)


def round_groups(groups: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """Codes, as floats, of groups [..., group] with scales [...]."""
    wide = scales.float().unsqueeze(-1)
    inverse = torch.where(wide == 0, 0.0, 1.0 / wide)
    return (groups * inverse).round_().clamp_(low, high)


def pack_groups(codes: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """int8 codes [n, k] and scales [n, ceil(k / group)] -> packed int8 or int4, values unchanged (scales to float16).

    Raises:
        ValueError: shapes do not fit the format's group.
    """
    n, k = codes.shape
    group = fmt.group
    if scales.shape != (n, -(-k // group)):
        raise ValueError(
            f"scales are {tuple(scales.shape)}, {fmt.name} of {n} x {k} needs {(n, -(-k // group))}"
        )
    rows, kp = _round_up(n, PANEL), _round_up(k, fmt.k_block)
    panels, pairs = rows // PANEL, kp // (2 * group)
    header = (
        _pad(scales.to(torch.float16), rows, kp // group).view(panels, PANEL, pairs, 2).permute(0, 2, 3, 1)
    )
    lanes = _lanes(_pad(codes, rows, kp), 4)  # [panels, k / 4, 2, 16, 4]
    if fmt.is_int4:
        unsigned = (lanes + 8).to(torch.uint8)
        data = unsigned[:, :, 0] | unsigned[:, :, 1] << 4
    else:
        data = lanes.contiguous().view(torch.uint8) ^ 0x80
    body = data.reshape(panels, pairs, -1)
    return torch.cat([_bytes(header).view(panels, pairs, -1), body], 2).flatten()


def _unpack_groups(data: Tensor, panels: int, kp: int, fmt: Format) -> Tensor:
    pairs = kp // (2 * fmt.group)
    rows = data.view(panels, pairs, -1)
    scales = rows[:, :, : 4 * PANEL].contiguous().view(torch.float16).view(panels, pairs * 2, PANEL)
    body = rows[:, :, 4 * PANEL :].reshape(panels, kp // 4, -1)
    if fmt.is_int4:
        nibbles = body.view(panels, kp // 4, 16, 4)
        lanes = torch.stack([nibbles & 15, nibbles >> 4], 2).to(torch.int8) - 8
    else:
        lanes = (body ^ 0x80).view(torch.int8).view(panels, kp // 4, 2, 16, 4)
    wide = scales.permute(0, 2, 1).reshape(panels * PANEL, -1).float()
    return _unlanes(lanes).float() * wide.repeat_interleave(fmt.group, 1)


# ---- GGUF blocks -------------------------------------------------------------------------------------------


def pack_q8_0(blocks: Tensor, k: int) -> Tensor:
    """GGUF Q8_0 rows, uint8 [n, k / 32 * 34] -> packed int8 group 32, values unchanged."""
    raw = blocks.view(blocks.shape[0], k // 32, 34)
    scales = raw[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return pack_groups(raw[..., 2:].contiguous().view(torch.int8).view(-1, k), scales, Format.INT8_G32)


def _nibble_panels(codes: Tensor) -> Tensor:
    """uint8 codes below 16, [rows, kp] -> [panels, kp / 256, 4096] bytes."""
    lanes = _lanes(codes, 4)
    return (lanes[:, :, 0] | lanes[:, :, 1] << 4).reshape(lanes.shape[0], codes.shape[1] // 256, -1)


def _panel_rows(x: Tensor) -> Tensor:
    """[rows, blocks, fields] -> [panels, blocks, fields, 32]."""
    rows, blocks, fields = x.shape
    return x.view(rows // PANEL, PANEL, blocks, fields).permute(0, 2, 3, 1)


def _pad_blocks(blocks: Tensor, block_bytes: int, k: int) -> Tensor:
    n = blocks.shape[0]
    if k % 256 or blocks.shape[1] != k // 256 * block_bytes:
        raise ValueError(f"rows of {blocks.shape[1]} bytes are not {k} weights in GGUF blocks of 256")
    return _pad(blocks, _round_up(n, PANEL), blocks.shape[1]).view(-1, k // 256, block_bytes)


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes [..., 12] -> scales and mins [..., 8], as ggml's get_scale_min_k4."""
    q = raw.to(torch.int32)
    low, mid, high = q[..., :4], q[..., 4:8], q[..., 8:]
    scales = torch.cat([low & 63, (high & 15) | (low >> 6) << 4], -1)
    mins = torch.cat([mid & 63, (high >> 4) | (mid >> 6) << 4], -1)
    return scales, mins


def pack_q4_k(blocks: Tensor, k: int) -> Tensor:
    """GGUF Q4_K rows, uint8 [n, k / 256 * 144] -> packed Q4_K: same values, same size."""
    raw = _pad_blocks(blocks, 144, k)
    halves = raw[..., :4].contiguous().view(torch.float16)  # d, dmin
    scales, mins = _six_bit_scales(raw[..., 4:16])
    word_a = sum((scales[..., i] << 6 * i for i in range(5)), (scales[..., 7] & 3) << 30)
    word_b = sum((mins[..., i] << 6 * i for i in range(5)), (scales[..., 7] >> 2 & 3) << 30)
    parts = (scales[..., 5], scales[..., 6], mins[..., 5], mins[..., 6], mins[..., 7])
    word_c = sum((part << 6 * i for i, part in enumerate(parts)), (scales[..., 7] >> 4) << 30)
    words = torch.stack([word_a, word_b, word_c], -1)
    quads = raw[..., 16:].view(*raw.shape[:2], 4, 1, 32)
    codes = torch.cat([quads & 15, quads >> 4], 3).view(raw.shape[0], k)
    panels, num_blocks = raw.shape[0] // PANEL, k // 256
    pieces = (_panel_rows(halves), _panel_rows(words), _nibble_panels(codes))
    return torch.cat([_bytes(piece).view(panels, num_blocks, -1) for piece in pieces], 2).flatten()


def _unpack_q4_k(data: Tensor, panels: int, kp: int) -> Tensor:
    blocks = data.view(panels, kp // 256, 4608)
    halves = blocks[..., :128].contiguous().view(torch.float16).view(panels, kp // 256, 2, PANEL)
    words = (
        blocks[..., 128:512].contiguous().view(torch.int32).view(panels, kp // 256, 3, PANEL).to(torch.int64)
        & 0xFFFFFFFF
    )
    a, b, c = words.unbind(2)
    last = a >> 30 | (b >> 30) << 2 | (c >> 30) << 4
    scales = torch.stack([*(a >> 6 * i & 63 for i in range(5)), c & 63, c >> 6 & 63, last], 2)
    mins = torch.stack([*(b >> 6 * i & 63 for i in range(5)), *(c >> 6 * i & 63 for i in (2, 3, 4))], 2)
    scale = (halves[:, :, :1].float() * scales).permute(0, 3, 1, 2).reshape(panels * PANEL, -1)
    minimum = (halves[:, :, 1:].float() * mins).permute(0, 3, 1, 2).reshape(panels * PANEL, -1)
    codes = _unpack_nibbles(blocks[..., 512:], panels, kp)
    return codes * scale.repeat_interleave(32, 1) - minimum.repeat_interleave(32, 1)


def _unpack_nibbles(body: Tensor, panels: int, kp: int) -> Tensor:
    nibbles = body.reshape(panels, kp // 4, 16, 4)
    return _unlanes(torch.stack([nibbles & 15, nibbles >> 4], 2)).float()


def pack_q6_k(blocks: Tensor, k: int) -> Tensor:
    """GGUF Q6_K rows, uint8 [n, k / 256 * 210] -> packed Q6_K: same values, same size."""
    raw = _pad_blocks(blocks, 210, k)
    rows, num_blocks = raw.shape[:2]
    low, high = (
        raw[..., :128].view(rows, num_blocks, 2, 2, 32),
        raw[..., 128:192].view(rows, num_blocks, 2, 1, 32),
    )
    scales, d = raw[..., 192:208], raw[..., 208:].contiguous().view(torch.float16)
    low4 = torch.cat([low & 15, low >> 4], 3).view(rows, k)
    high2 = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 3).view(rows, k)
    # per eight k: bits 0-1 first quad rows 0-15, 2-3 first quad rows 16-31, 4-5 and 6-7 second quad
    lanes = _lanes(high2, 4).reshape(rows // PANEL, k // 8, 2, 2, 16, 4)
    packed_high = lanes[:, :, 0, 0] | lanes[:, :, 0, 1] << 2 | lanes[:, :, 1, 0] << 4 | lanes[:, :, 1, 1] << 6
    panels = rows // PANEL
    low_bytes = _nibble_panels(low4).reshape(panels, k // 8, 128)
    bits = torch.cat([low_bytes, packed_high.reshape(panels, k // 8, 64)], 2)
    pieces = (_panel_rows(d), _panel_rows(scales), bits)
    return torch.cat([_bytes(piece).view(panels, num_blocks, -1) for piece in pieces], 2).flatten()


def _unpack_q6_k(data: Tensor, panels: int, kp: int) -> Tensor:
    blocks = data.view(panels, kp // 256, 6720)
    d = blocks[..., :64].contiguous().view(torch.float16).view(panels, kp // 256, 1, PANEL).float()
    scales = blocks[..., 64:576].contiguous().view(torch.int8).view(panels, kp // 256, 16, PANEL)
    scale = (d * scales).permute(0, 3, 1, 2).reshape(panels * PANEL, -1)
    bits = blocks[..., 576:].reshape(panels, kp // 8, 192)
    low4 = _unpack_nibbles(bits[..., :128], panels, kp)
    high = bits[..., 128:].reshape(panels, kp // 8, 16, 4)
    quads = torch.stack(
        [torch.stack([high & 3, high >> 2 & 3], 2), torch.stack([high >> 4 & 3, high >> 6], 2)], 2
    )
    high2 = _unlanes(quads.reshape(panels, kp // 4, 2, 16, 4)).float()
    return (low4 + 16 * high2 - 32) * scale.repeat_interleave(16, 1)


# ---- one door ----------------------------------------------------------------------------------------------


def quantize(weight: Tensor, fmt: Format) -> Tensor:
    """[n, k] or [num_experts, n, k] of floats -> packed [num_bytes] or [num_experts, num_bytes].

    The reference of `ops.quantize`, which is what everything but tests calls.

    Raises:
        ValueError: the format has no quantiser here (Q4_K and Q6_K come from GGUF files), or a weight has no code.
    """
    if weight.dim() == 3:
        return torch.stack([quantize(expert, fmt) for expert in weight])
    if fmt == Format.BF16:
        return pack_bf16(weight)
    if fmt == Format.FP8:
        return pack_fp8(*quantize_fp8(weight))
    if fmt.is_int8 or fmt.is_int4:
        return pack_groups(*quantize_groups(weight, 8 if fmt.is_int8 else 4, fmt.group), fmt)
    raise ValueError(f"{fmt.name} weights are read from GGUF files, not made here; use int4 or int8")


_UNPACK: dict[Format, Callable[[Tensor, int, int], Tensor]] = {
    Format.BF16: _unpack_bf16,
    Format.FP8: _unpack_fp8,
    Format.Q4_K: _unpack_q4_k,
    Format.Q6_K: _unpack_q6_k,
}


def unpack(packed: Tensor, fmt: Format, n: int, k: int) -> Tensor:
    """Packed [num_bytes] or [num_experts, num_bytes] -> float32 [n, k] or [num_experts, n, k]."""
    if packed.dim() == 2:
        return torch.stack([unpack(expert, fmt, n, k) for expert in packed])
    if packed.numel() != packed_bytes(fmt, n, k):
        raise ValueError(
            f"packed weight has {packed.numel()} bytes, {fmt.name} of {n} x {k} has {packed_bytes(fmt, n, k)}"
        )
    panels, kp = -(-n // PANEL), _round_up(k, fmt.k_block)
    inverse = _UNPACK.get(fmt)
    full = inverse(packed, panels, kp) if inverse is not None else _unpack_groups(packed, panels, kp, fmt)
    return full[:n, :k].contiguous()
