# mypy: ignore-errors
"""Device code of the norms and of the rotary embedding, in Triton; `cuda.py` launches it.

Norms are zero-centred (times 1 + weight), computed in float32 and rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, residual, weight, out, total, size, eps, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """Grid (rows,). With a residual the sum is rounded to x's dtype first and stored in `total`."""
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
