# mypy: ignore-errors
"""Device code of the norms and of the rotary embedding, in Triton; `cuda.py` launches it.

Norms are zero-centred (times 1 + weight), computed in float32 and rounded once.
"""

import triton
import triton.language as tl

from stepflash.kernels.triton_start import enter


@triton.jit
def rms_norm(
    x, residual, weight, out, total, size, eps, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """Grid (rows,). With a residual the sum is rounded to x's dtype first and stored in `total`."""
    enter()
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    wide = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row + column, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    gain = 1.0 + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (wide * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def row_scale(x, row, size, eps, BLOCK: tl.constexpr):
    """What a norm multiplies row `row` of x [rows, size] with, beside its weight."""
    column = tl.arange(0, BLOCK)
    wide = tl.load(x + row.to(tl.int64) * size + column, mask=column < size, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)


@triton.jit
def row_scales(x, out, size, eps, BLOCK: tl.constexpr):
    """Grid (rows,)."""
    enter()
    row = tl.program_id(0)
    tl.store(out + row, row_scale(x, row, size, eps, BLOCK))


@triton.jit
def norm_rope(
    x, weight, out, cos, sin, x_stride, eps, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, NUM_HEADS): norm of one head, then dimensions (j, j + HALF), j < HALF, turn."""
    enter()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    inside, turns = dim < HEAD_DIM, dim < 2 * HALF
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    source = x + token * x_stride + head * HEAD_DIM
    wide = tl.load(source + dim, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / HEAD_DIM + eps)
    normed = wide * scale * (1.0 + tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32))
    across = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
    across = across * scale * (1.0 + tl.load(weight + partner, mask=turns, other=0.0).to(tl.float32))
    angle = token * HALF + tl.where(dim < HALF, dim, dim - HALF)
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    turned = normed * c + tl.where(dim < HALF, -across, across) * s
    result = tl.where(turns, turned, normed)
    at = (token * NUM_HEADS + head) * HEAD_DIM + dim
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(parts, at, stride, mask, PARTS: tl.constexpr):
    """The sum over parts, `stride` apart, in order."""
    total = tl.load(parts + at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * stride + at, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def finish_heads(
    parts, gate_parts, q_weight, k_weight, cos, sin, q, k, v, gate, x, slots, k_scales, v_scales, num_tokens, size,
    eps, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_X: tl.constexpr, PARTS: tl.constexpr,
    GATE_PARTS: tl.constexpr, SCALED: tl.constexpr, CACHED: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, blocks of BLOCK_H heads of q, k and v, and one for the gate): adds the parts of the
    projections and rounds them as `linear` does, then norm and rotation of q's and k's heads as in `norm_rope`.
    SCALED: the parts times `row_scale` of x. CACHED: k and v are a cache, written as `write_slots` does."""
    enter()
    token = tl.program_id(0).to(tl.int64)
    HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    if tl.program_id(1) * BLOCK_H >= HEADS:
        column = tl.arange(0, BLOCK_G)
        stride = tl.full([], num_tokens, tl.int64) * NUM_HEADS
        total = add_parts(gate_parts, token * NUM_HEADS + column, stride, column < NUM_HEADS, GATE_PARTS)
        if SCALED:
            total *= row_scale(x, token, size, eps, BLOCK_X)
        tl.store(gate + token * NUM_HEADS + column, total.to(gate.dtype.element_ty), mask=column < NUM_HEADS)
        return
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (dim < HEAD_DIM) & (head < HEADS)
    turns = (dim < 2 * HALF) & (head < HEADS)
    stride = tl.full([], num_tokens, tl.int64) * HEADS * HEAD_DIM
    begin = (token * HEADS + head) * HEAD_DIM
    dtype = q.dtype.element_ty
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    sums = add_parts(parts, begin + dim, stride, inside, PARTS)
    across = add_parts(parts, begin + partner, stride, turns, PARTS)
    if SCALED:
        factor = row_scale(x, token, size, eps, BLOCK_X)
        sums, across = sums * factor, across * factor
    rounded, across = sums.to(dtype), across.to(dtype).to(tl.float32)
    is_q, is_v = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    kv_row = token * NUM_KV_HEADS + head - tl.where(is_v, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS)
    if CACHED:
        slot = tl.load(slots + token)
        kv_row += (slot - token) * NUM_KV_HEADS
        is_written = head * 0 + slot >= 0
        is_k, is_v = is_k & is_written, is_v & is_written
    store_heads(v, v_scales, rounded, kv_row, dim, is_v & (head < HEADS), HEAD_DIM, INT8)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + eps)[:, None]
    gain = tl.where(is_q, load_gain(q_weight, dim, HEAD_DIM), load_gain(k_weight, dim, HEAD_DIM))
    partner_gain = tl.where(
        is_q, load_gain(q_weight, partner, HEAD_DIM), load_gain(k_weight, partner, HEAD_DIM)
    )
    normed, across = wide * scale * gain, across * scale * partner_gain
    angle = token * HALF + tl.where(dim < HALF, dim, dim - HALF)
    c = tl.load(cos + angle, mask=dim < 2 * HALF, other=1.0)
    s = tl.load(sin + angle, mask=dim < 2 * HALF, other=0.0)
    turned = normed * c + tl.where(dim < HALF, -across, across) * s
    result = tl.where(turns, turned, normed).to(dtype)
    tl.store(q + (token * NUM_HEADS + head) * HEAD_DIM + dim, result, mask=inside & is_q)
    store_heads(k, k_scales, result, kv_row, dim, is_k, HEAD_DIM, INT8)


@triton.jit
def store_heads(target, scales, heads, row, dim, live, HEAD_DIM: tl.constexpr, INT8: tl.constexpr):
    """Into rows `row` [heads, 1] of target; as int8 with a scale, peak / 127."""
    if INT8:
        heads, peak = as_int8(heads.to(tl.float32), 1)
        tl.store(scales + row, peak[:, None] / 127.0, mask=live)
    tl.store(target + row * HEAD_DIM + dim, heads.to(target.dtype.element_ty), mask=live & (dim < HEAD_DIM))


@triton.jit
def as_int8(wide, AXIS: tl.constexpr):
    """float32 scaled to -127..127 along an axis and rounded, still as float32, and the peaks."""
    peak = tl.max(tl.abs(wide), AXIS)
    factor = tl.where(peak > 0, 127.0 / tl.where(peak > 0, peak, 1.0), 0.0)
    # 1.5 * 2 ** 23 rounds to the nearest even integer.
    return (wide * tl.expand_dims(factor, AXIS) + 12582912.0) - 12582912.0, peak


@triton.jit
def load_gain(weight, dim, HEAD_DIM: tl.constexpr):
    """What a zero-centred norm multiplies dimensions with; 1 beyond the head."""
    return 1.0 + tl.load(weight + dim, mask=(dim >= 0) & (dim < HEAD_DIM), other=0.0).to(tl.float32)
