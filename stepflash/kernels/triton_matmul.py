# mypy: ignore-errors
"""Device code of products with packed weights, in Triton; `cuda.py` launches it.

Weights are read as `formats.py` packs them: panels of 32 rows. Codes of every format are exact in bf16; a group's
scale multiplies the float32 sum over that group, so nothing is rounded but activations, to bf16.

Rows are grouped by expert: block b of BLOCK_M entries of `rows` belongs to expert experts[b]; an entry is a row of
the result, or -1 for none. A dense product is one expert. All sizes of tiles are fixed: a row's sums have the same
order whatever else is in the call.
"""

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)


@triton.jit
def multiply(x, codes, scales, n, first_k, padded_k, live_n, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
             GROUP: tl.constexpr):  # fmt: skip
    """x [BLOCK_M, BLOCK_K] bf16 times the tile of rows n [BLOCK_N] from column first_k; inside one group of k.

    codes, scales: the same bytes of one packed weight, as the types of its codes and of its scales.
    """
    k = first_k + tl.arange(0, BLOCK_K)
    live = (k < padded_k)[:, None] & live_n[None, :]
    panel, row = (n // 32).to(tl.int64), n % 32
    if KIND == BF16:
        at = panel[None, :] * padded_k * 32 + (k // 2 * 64 + k % 2)[:, None] + (row * 2)[None, :]
        return tl.dot(x, tl.load(codes + at, mask=live, other=0.0))
    if KIND == FP8:
        header = (padded_k // 128 * 4 + 63) // 64 * 64
        panel_bytes = header + padded_k * 32
        lane = row % 16 // 4 * 16 + row // 16 * 8 + row % 4 * 2
        at = (panel * panel_bytes + header + lane)[None, :] + (k // 2 * 64 + k % 2)[:, None]
        code = tl.load(codes + at, mask=live, other=0).to(tl.uint16)
        # e4m3 in the exponent and mantissa of a half is the value / 256, subnormals too; weights hold no NaN.
        half = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.float16, bitcast=True)
        values = (half.to(tl.float32) * 256.0).to(tl.bfloat16)
        scale = tl.load(scales + panel * (panel_bytes // 4) + first_k // 128, mask=live_n, other=0.0)
        return tl.dot(x, values) * scale[None, :]
    if KIND == INT8:
        pair_bytes = 128 + 64 * GROUP
        within = k % (2 * GROUP) // 4 * 128 + k % 4
        lane = row * 4
    else:
        pair_bytes = 128 + 32 * GROUP
        within = k % (2 * GROUP) // 4 * 64 + k % 4
        lane = row % 16 * 4
    panel_bytes = panel * (padded_k // (2 * GROUP) * pair_bytes)
    at = (panel_bytes + 128 + lane)[None, :] + (k // (2 * GROUP) * pair_bytes + within)[:, None]
    code = tl.load(codes + at, mask=live, other=0).to(tl.int32)
    if KIND == INT8:
        values = code - 128
    else:
        values = (code >> (row // 16 * 4)[None, :] & 15) - 8
    scale_at = panel_bytes // 2 + first_k // (2 * GROUP) * (pair_bytes // 2) + first_k // GROUP % 2 * 32 + row
    scale = tl.load(scales + scale_at, mask=live_n, other=0.0).to(tl.float32)
    return tl.dot(x, values.to(tl.float32).to(tl.bfloat16)) * scale[None, :]


@triton.jit
def load_rows(x, row, live, first_k, in_features, BLOCK_K: tl.constexpr):
    k = first_k + tl.arange(0, BLOCK_K)
    at = row.to(tl.int64)[:, None] * in_features + k[None, :]
    return tl.load(x + at, mask=live[:, None] & (k < in_features)[None, :], other=0.0).to(tl.bfloat16)


@triton.jit
def swiglu(
    x, gate, gate_scales, up, up_scales, rows, experts, out, code_stride, scale_stride, in_features, padded_k, size,
    num_experts, limit, TOP_K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, column blocks): out[row] = min(silu(gate), limit) * clamp(up) of x[row // TOP_K], bf16."""
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert >= num_experts:
        return
    row = tl.load(rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, live_n = row >= 0, n < size
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ups = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate, gate_scales = gate + expert * code_stride, gate_scales + expert * scale_stride
    up, up_scales = up + expert * code_stride, up_scales + expert * scale_stride
    for first_k in range(0, in_features, BLOCK_K):
        tile = load_rows(x, row // TOP_K, live, first_k, in_features, BLOCK_K)
        gates += multiply(tile, gate, gate_scales, n, first_k, padded_k, live_n, BLOCK_K, KIND, GROUP)
        ups += multiply(tile, up, up_scales, n, first_k, padded_k, live_n, BLOCK_K, KIND, GROUP)
    activated = gates * tl.sigmoid(gates)
    if LIMITED:
        activated = tl.minimum(activated, limit)
        ups = tl.minimum(tl.maximum(ups, -limit), limit)
    at = row.to(tl.int64)[:, None] * size + n[None, :]
    tl.store(out + at, (activated * ups).to(tl.bfloat16), mask=live[:, None] & live_n[None, :])


@triton.jit
def matmul(
    x, codes, scales, rows, experts, row_weights, out, out_stride, code_stride, scale_stride, in_features, padded_k,
    size, num_experts, KIND: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, column blocks): out[row] = x[row] @ weight.T, times row_weights[row], float32."""
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert >= num_experts:
        return
    row = tl.load(rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, live_n = row >= 0, n < size
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    codes, scales = codes + expert * code_stride, scales + expert * scale_stride
    for first_k in range(0, in_features, BLOCK_K):
        tile = load_rows(x, row, live, first_k, in_features, BLOCK_K)
        sums += multiply(tile, codes, scales, n, first_k, padded_k, live_n, BLOCK_K, KIND, GROUP)
    if WEIGHTED:
        sums = sums * tl.load(row_weights + row, mask=live, other=0.0)[:, None]
    at = row.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(out + at, sums, mask=live[:, None] & live_n[None, :])


@triton.jit
def combine(
    routed, shared, residual, out, size, TOP_K: tl.constexpr, HAS_SHARED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, column blocks): the token's TOP_K routed rows in order, shared expert, residual."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        total += tl.load(routed + (token * TOP_K + choice) * size + column, mask=inside, other=0.0)
    if HAS_SHARED:
        total += tl.load(shared + token * size + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)
