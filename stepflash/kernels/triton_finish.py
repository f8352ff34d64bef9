# mypy: ignore-errors
"""Device code of what follows products, in Triton: sums over splits and experts, residuals, gates."""

import triton
import triton.language as tl

from stepflash.kernels.triton_start import enter


@triton.jit(do_not_specialize=["num_tokens"])
def finish(
    parts, residual, out, num_tokens, size, SPLITS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (num_tokens, column blocks): parts [SPLITS, num_tokens, size] in order, plus the residual."""
    enter()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * num_tokens + token) * size + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def combine(
    routed, parts, residual, gain, out, scaled, num_tokens, size, TOP_K: tl.constexpr, PARTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, column blocks): the token's TOP_K routed rows in order, the shared expert, the residual.

    routed [num_tokens * TOP_K, size]; parts [PARTS, num_tokens, size], of the shared expert; float32. HAS_GAIN: the
    sum times a norm's 1 + gain, too, as what its products read.
    """
    enter()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(routed + (token * TOP_K + choice) * size + column, mask=inside, other=0.0)
    if PARTS:
        dense = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            dense += tl.load(parts + (part * num_tokens + token) * size + column, mask=inside, other=0.0)
        total += dense
    if HAS_RESIDUAL:
        total += tl.load(residual + token * size + column, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + token * size + column, rounded, mask=inside)
    if HAS_GAIN:
        factor = 1.0 + tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            scaled + token * size + column, (rounded.to(tl.float32) * factor).to(tl.bfloat16), mask=inside
        )


@triton.jit
def gated(x, gate, out, size, num_heads, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (num_tokens, column blocks): x [num_tokens, size], heads side by side, times sigmoid of their gates."""
    enter()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    wide = tl.load(x + token * size + column, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + token * num_heads + column // HEAD_DIM, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + column, (wide * tl.sigmoid(gates)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def times_gain(x, gain, out, size, BLOCK: tl.constexpr):
    """Grid (num_tokens, column blocks): x [num_tokens, size] times 1 + gain, as bf16."""
    enter()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = tl.program_id(0).to(tl.int64) * size + column, column < size
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (wide * factor).to(tl.bfloat16), mask=inside)
