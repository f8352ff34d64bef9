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
    parts, gate_parts, q_weight, k_weight, cos, sin, q, k, v, gate, num_tokens, eps, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr, GATE_PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, blocks of BLOCK_H heads of q, k and v, and one for the gate): adds the parts of the
    projections and rounds them as `linear` does, then norm and rotation of q's and k's heads as in `norm_rope`."""
    enter()
    token = tl.program_id(0).to(tl.int64)
    HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    if tl.program_id(1) * BLOCK_H >= HEADS:
        column = tl.arange(0, BLOCK_G)
        stride = tl.full([], num_tokens, tl.int64) * NUM_HEADS
        total = add_parts(gate_parts, token * NUM_HEADS + column, stride, column < NUM_HEADS, GATE_PARTS)
        tl.store(gate + token * NUM_HEADS + column, total.to(gate.dtype.element_ty), mask=column < NUM_HEADS)
        return
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (dim < HEAD_DIM) & (head < HEADS)
    turns = (dim < 2 * HALF) & (head < HEADS)
    stride = tl.full([], num_tokens, tl.int64) * HEADS * HEAD_DIM
    begin = (token * HEADS + head) * HEAD_DIM
    dtype = q.dtype.element_ty
    rounded = add_parts(parts, begin + dim, stride, inside, PARTS).to(dtype)
    is_q, is_v = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    kv_row = token * NUM_KV_HEADS + head - tl.where(is_v, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS)
    tl.store(v + kv_row * HEAD_DIM + dim, rounded, mask=inside & is_v)
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    across = add_parts(parts, begin + partner, stride, turns, PARTS).to(dtype).to(tl.float32)
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
    tl.store(
        k + kv_row * HEAD_DIM + dim,
        result,
        mask=inside & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS),
    )


@triton.jit
def load_gain(weight, dim, HEAD_DIM: tl.constexpr):
    """What a zero-centred norm multiplies dimensions with; 1 beyond the head."""
    return 1.0 + tl.load(weight + dim, mask=(dim >= 0) & (dim < HEAD_DIM), other=0.0).to(tl.float32)
