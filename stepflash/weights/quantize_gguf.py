"""Floats to ggml's quantised blocks: the reverse of `dequantize.py`, byte for byte what llama.cpp writes.

Q8_0 rounds; Q4_K, Q5_K and Q6_K search for each sub-block's scale (and minimum) as ggml's `quantize_row_*_ref` do
without an importance matrix. Equal bytes need equal rounding, so every sum here runs over the elements of a
sub-block in ggml's order, in float32, and is vectorised over sub-blocks instead: values are laid out as
[elements of a sub-block, number of sub-blocks]. Checked against ggml itself by `make test-interop`; ggml agrees
with itself only where its compiler does not fuse multiply and add (x86-64 builds).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from stepflash.gguf_file import GGML_TYPES, TYPE_IDS

PIECE_ELEMENTS = 1 << 19  # encoded together: small enough for the temporaries to stay in the cache
_TINY = 1e-15  # ggml's GROUP_MAX_EPS: below it a group counts as all zero


def encode(values: Tensor, type_name: str) -> Tensor:
    """Quantise or cast.

    Args:
        values: any float dtype, a whole number of blocks in row-major order.
        type_name: a key of `ENCODERS`, or F32, F16 or BF16.
    Returns:
        uint8, flat: the tensor's bytes in a GGUF file.
    """
    if type_name in PLAIN_DTYPES:
        return values.to(PLAIN_DTYPES[type_name]).contiguous().view(-1).view(torch.uint8)
    blocks = values.float().reshape(-1, GGML_TYPES[TYPE_IDS[type_name]].block_size)
    return ENCODERS[type_name](blocks).reshape(-1)


def encode_pieces(pieces: Iterable[Tensor], type_name: str) -> Iterator[Tensor]:
    """Encode a tensor that comes in pieces of any size; each result is some whole blocks, uint8."""
    block_size = GGML_TYPES[TYPE_IDS[type_name]].block_size
    rest = torch.empty(0)
    for piece in pieces:
        flat = piece.reshape(-1)
        if rest.numel():
            flat = torch.cat((rest, flat.float()))
        whole = flat.numel() // block_size * block_size
        for start in range(0, whole, PIECE_ELEMENTS):
            yield encode(flat[start : min(start + PIECE_ELEMENTS, whole)], type_name)
        rest = flat[whole:].float().clone()
    assert not rest.numel(), "rows are whole blocks, so the tensor is"


def _round(values: Tensor) -> Tensor:
    """ggml's nearest_int: ties to even."""
    return values.round()


def _round_half_away(values: Tensor) -> Tensor:
    """C's roundf. Adding 0.5 first would be wrong for the float below 0.5."""
    whole = values.trunc()
    return whole + values.sign() * ((values - whole).abs() >= 0.5)


def _half_bytes(values: Tensor) -> Tensor:
    """float32 [n] -> the bytes of its float16: uint8 [n, 2]."""
    return values.to(torch.float16).view(-1, 1).view(torch.uint8)


def _over(numerator: float, values: Tensor) -> Tensor:
    """numerator / values. NOTE: torch's `scalar / tensor` multiplies by a reciprocal and rounds twice."""
    return torch.div(torch.tensor(numerator, dtype=torch.float32), values)


def _sum(rows: Tensor) -> Tensor:
    """Sum over the first dimension, strictly in order, as a scalar loop does."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _q8_0(blocks: Tensor) -> Tensor:
    """[n, 32] -> [n, 34]: d = max |x| / 127, then round(x / d) by way of the reciprocal."""
    d = blocks.abs().amax(dim=1) / 127
    inverse = torch.where(d > 0, _over(1, d), 0.0)
    quants = _round_half_away(blocks * inverse[:, None]).to(torch.int8)
    return torch.cat((_half_bytes(d), quants.view(torch.uint8)), dim=1)


def _scale_and_minimum(
    x: Tensor, weights: Tensor, largest: int, first: float, num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x ~ scale * l - minimum with l in 0..largest, least weighted squares: ggml's make_qkx2_quants.

    A first guess from the range, then `num_steps` + 1 more divisions of the range, each followed by the best scale
    and minimum for its integers. As in ggml the range's lower end moves with the best minimum so far.

    Args:
        x, weights: [32, num_subblocks] float32.
    Returns:
        scale [n], minimum [n] (not negative), l [32, n].
    """
    low, high = x.amin(dim=0).clamp(max=0.0), x.amax(dim=0)
    flat = high == low
    sum_w, sum_x = _sum(weights), _sum(weights * x)

    inverse = _over(largest, high - low)
    levels = _round(inverse * (x - low)).clamp(0, largest)
    scale = _over(1, inverse)
    difference = scale * levels + low - x
    best = _sum(weights * (difference * difference))
    for step in range(num_steps + 1):
        start = torch.tensor(0.1, dtype=torch.float32) * step + first + largest
        tried = _round(start / (high - low) * (x - low)).clamp(0, largest)
        weighted = weights * tried
        sum_l, sum_l2, sum_xl = _sum(weighted), _sum(weighted * tried), _sum(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_scale = torch.where(above, sum_xl / sum_l2, new_scale)
        new_low = torch.where(above, 0.0, new_low)
        difference = new_scale * tried + new_low - x
        error = _sum(weights * (difference * difference))
        better = (determinant > 0) & (error < best)
        levels = torch.where(better, tried, levels)
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
    return torch.where(flat, 0.0, scale), -low, torch.where(flat, 0.0, levels)


def _k_levels(blocks: Tensor, largest: int, first: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """What Q4_K and Q5_K share: header [n, 16] (d, dmin, packed scales) and levels uint8 [n, 8, 32]."""
    num_blocks = blocks.shape[0]
    x = blocks.view(-1, 32).T.contiguous()  # [32, 8 n]
    # In float64, because torch's float32 square root is not always the nearest number.
    weights = (_sum(x * x) / 32).double().sqrt().float() + x.abs()
    scale, minimum, levels = _scale_and_minimum(x, weights, largest, first, num_steps)

    scales, minima = scale.view(num_blocks, 8), minimum.view(num_blocks, 8)
    max_scale, max_minimum = scales.amax(dim=1).relu(), minima.amax(dim=1).relu() + 0.0  # no -0
    packed_scales = _six_bits(scales, max_scale)
    packed_minima = _six_bits(minima, max_minimum)
    d, d_minimum = (max_scale / 63).to(torch.float16), (max_minimum / 63).to(torch.float16)

    step = (d.float()[:, None] * packed_scales.float()).view(-1)
    offset = (d_minimum.float()[:, None] * packed_minima.float()).view(-1)
    refined = _round((x + offset) / step).clamp(0, largest)
    levels = torch.where(step != 0, refined, levels)
    header = torch.cat(
        (_half_bytes(d), _half_bytes(d_minimum), _pack_six_bits(packed_scales, packed_minima)), 1
    )
    return header, levels.T.reshape(num_blocks, 8, 32).to(torch.uint8)


def _six_bits(values: Tensor, largest: Tensor) -> Tensor:
    """[n, 8] in sixty-thirds of the block's largest: uint8 0..63. A negative one wraps round, as ggml's cast does."""
    inverse = torch.where(largest > 0, _over(63, largest), 0.0)
    return (_round(inverse[:, None] * values).to(torch.int32) & 255).clamp(max=63).to(torch.uint8)


def _pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Two [n, 8] of 6 bits -> [n, 12]; see `dequantize._scales_and_minima` for the layout."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    last = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat((first, second, last), dim=1)


def _pack_nibbles(levels: Tensor) -> Tensor:
    """Sub-blocks [n, 8, 32] of 4 bits in pairs, one low and the next high: [n, 128]."""
    pairs = levels.view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)


def _q4_k(blocks: Tensor) -> Tensor:
    """[n, 256] -> [n, 144]."""
    header, levels = _k_levels(blocks, largest=15, first=-1.0, num_steps=20)
    return torch.cat((header, _pack_nibbles(levels)), dim=1)


def _q5_k(blocks: Tensor) -> Tensor:
    """[n, 256] -> [n, 176]: as Q4_K, the fifth bits before the nibbles, bit j of a byte for sub-block j."""
    header, levels = _k_levels(blocks, largest=31, first=-0.5, num_steps=15)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = ((levels >> 4) << shifts).sum(dim=1, dtype=torch.uint8)  # [n, 32]
    return torch.cat((header, high, _pack_nibbles(levels & 15)), dim=1)


def _signed_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """x ~ scale * l with l in -32..31, least squares weighted by x^2: ggml's make_qx_quants.

    Args:
        x: [16, num_groups] float32.
    Returns:
        scale [num_groups], l [16, num_groups].
    """
    magnitude = x.abs()
    largest_magnitude = magnitude.amax(dim=0)
    # The signed value of the first element of largest magnitude; argmax may return any of equal ones.
    is_largest = magnitude == largest_magnitude
    position = torch.arange(x.shape[0])[:, None]
    first = torch.where(is_largest, position, x.shape[0]).amin(dim=0)
    largest = x.gather(0, first[None])[0]
    weights = x * x

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = _round(inverse * x).clamp(-32, 31)
        return levels, _sum(weights * x * levels), _sum(weights * levels * levels)

    levels, sum_xl, sum_l2 = fit(_over(-32, largest))
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
    best = scale * sum_xl
    for step in (*range(-9, 0), *range(1, 10)):
        inverse = -(torch.tensor(0.1, dtype=torch.float32) * step + 32) / largest
        tried, sum_xl, sum_l2 = fit(inverse)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        levels = torch.where(better, tried, levels)
        scale = torch.where(better, sum_xl / sum_l2, scale)
        best = torch.where(better, scale * sum_xl, best)
    zero = largest_magnitude < _TINY
    return torch.where(zero, 0.0, scale), torch.where(zero, -32.0, levels)


def _q6_k(blocks: Tensor) -> Tensor:
    """[n, 256] -> [n, 210]: low nibbles, high pairs of bits, 16 int8 scales, d."""
    num_blocks = blocks.shape[0]
    x = blocks.view(-1, 16).T.contiguous()  # [16, 16 n]
    scale, levels = _signed_scale(x)
    scales = scale.view(num_blocks, 16)
    magnitude = scales.abs()
    largest_magnitude = magnitude.amax(dim=1)
    position = torch.arange(16)
    first = torch.where(magnitude == largest_magnitude[:, None], position, 16).amin(dim=1)
    largest = scales.gather(1, first[:, None])[:, 0]
    zero = largest_magnitude < _TINY

    inverse = _over(-128, largest)
    d = _over(1, inverse).to(torch.float16)
    small = _round(inverse[:, None] * scales).clamp(max=127)
    small = torch.where(zero[:, None], 0.0, small)
    step = (d.float()[:, None] * small).view(-1)
    refined = _round(x / step).clamp(-32, 31)
    levels = torch.where(step != 0, refined, levels)
    unsigned = (levels.T.reshape(num_blocks, 2, 4, 32) + 32).to(torch.uint8)
    low, high = unsigned & 15, unsigned >> 4
    low = low[:, :, :2] | (low[:, :, 2:] << 4)  # groups 0 and 1 low, 2 and 3 high
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = (high << shifts).sum(dim=2, dtype=torch.uint8)  # [n, 2, 32]
    scale_bytes = small.to(torch.int8).view(torch.uint8)
    encoded = torch.cat((low.flatten(1), high.flatten(1), scale_bytes, _half_bytes(d)), dim=1)
    return torch.where(zero[:, None], torch.zeros((), dtype=torch.uint8), encoded)


PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
