# mypy: ignore-errors
"""Device code of products with packed weights, in Triton; `cuda_matmul.py` launches it.

Weights lie as `cuda_layout.py` lays them: 2 KiB tiles of 64 rows, in which 16 bytes are what a thread of a warpgroup
multiplies. They go from memory through shared memory to the registers of the matrix unit and are decoded there;
the product is computed transposed, weights times activations, so that a few tokens are the short side of it. Codes of
every format are exact in bf16; a group's scale multiplies the float32 sum over that group, so nothing is rounded but
activations, to bf16.

A token's sum over k has one order whatever else is in the call: steps of the weight's columns in ascending order
within a split, then splits in ascending order, whether a split is a program of its own (few tokens) or not.

Rows of the result are grouped by expert: block b of BLOCK_T entries of `rows` belongs to expert experts[b]; an entry
is a row of the result, or -1 for none. A dense product is one expert.
"""

import triton
import triton.language as tl

from stepflash.kernels.triton_start import ON_DEVICE, announce, is_last, wait

BF16 = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)


# ---- codes to bf16 ------------------------------------------------------------------------------------------


@triton.jit
def decode_int4(words):
    """int32 [ROWS / 64, 512] -> bf16 [.., 2, 2, 2] of the nibbles p q r minus 8, r last. 0x43xx is 128 + xx."""
    if ON_DEVICE:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, one, off;
            mov.b32 one, 0x3F803F80;
            mov.b32 off, 0xC308C308;
            lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, a, one, off;
            mov.b32 {$0, $4}, a;
            shr.b32 a, $8, 4;
            lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, a, one, off;
            mov.b32 {$1, $5}, a;
            shr.b32 a, $8, 8;
            lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, a, one, off;
            mov.b32 {$2, $6}, a;
            shr.b32 a, $8, 12;
            lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, a, one, off;
            mov.b32 {$3, $7}, a;
            }""",
            "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        return tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))).to(
            tl.bfloat16, bitcast=True
        )
    nibble = tl.reshape(tl.arange(0, 8), (1, 1, 2, 2, 2))
    code = tl.expand_dims(tl.expand_dims(tl.expand_dims(words, 2), 3), 4) >> nibble * 4
    return ((code & 15) - 8).to(tl.float32).to(tl.bfloat16)


@triton.jit
def decode_int8(raw):
    """uint8 -> bf16 of code - 128: 128 + the low seven bits, minus 128 or, where the top bit is clear, 256."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, one;
            mov.b32 one, 0x3F803F80;
            prmt.b32 a, $2, 0, 0x4140;
            prmt.b32 b, $2, 0, 0x4342;
            lop3.b32 c, a, 0x00800080, 0xC380C380, 0x6A;
            lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, a, one, c;
            lop3.b32 c, b, 0x00800080, 0xC380C380, 0x6A;
            lop3.b32 b, b, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $1, b, one, c;
            }""",
            "=r,=r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return (raw.to(tl.int32) - 128).to(tl.float32).to(tl.bfloat16)


@triton.jit
def decode_fp8(raw):
    """e4m3 -> bf16: its bits in bf16's exponent and mantissa are the value times 2^-120, subnormals too."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, scale, zero;
            mov.b32 scale, 0x7B807B80;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.b32 c, a, 4;
            and.b32 c, c, 0x07F007F0;
            lop3.b32 a, a, 0x80008000, c, 0xEA;
            fma.rn.bf16x2 $0, a, scale, zero;
            shr.b32 c, b, 4;
            and.b32 c, c, 0x07F007F0;
            lop3.b32 b, b, 0x80008000, c, 0xEA;
            fma.rn.bf16x2 $1, b, scale, zero;
            }""",
            "=r,=r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    code = raw.to(tl.uint16)
    half = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.float16, bitcast=True)  # the value / 256
    return (half.to(tl.float32) * 256.0).to(tl.bfloat16)


# ---- sums over k --------------------------------------------------------------------------------------------


@triton.jit
def fragment(tiles, ROWS: tl.constexpr):
    """Decoded tiles [ROWS / 64, 2048] as weights [ROWS, 32]: a thread keeps what it holds."""
    # Warp, row, column pair; 16 and 8 columns, 8 rows, pair.
    parts = tl.reshape(tiles, (ROWS // 16, 8, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(parts, (0, 5, 1, 3, 4, 2, 6)), (ROWS, 32))


@triton.jit
def load_x(x, source, live, first_k, in_features, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Activations [WIDTH, BLOCK_T] bf16 of the rows `source` from column first_k."""
    k = first_k + tl.arange(0, WIDTH)
    at = source[None, :] * in_features + k[:, None]
    inside = live[None, :] if EVEN else live[None, :] & (k < in_features)[:, None]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.bfloat16)


@triton.jit
def load_tiles(codes, tile, stride, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Tile `tile` of these rows, of SIZE bytes or words: [ROWS / 64, SIZE]."""
    at = tl.arange(0, ROWS // 64)[:, None] * stride + tl.arange(0, SIZE)[None, :]
    return tl.load(codes + tile * SIZE + at)


@triton.jit
def fragments(words, ROWS: tl.constexpr):
    """int4 tiles [ROWS / 64, 512] as weights [ROWS, 64]."""
    # Warp, row, column pair; 16 and 8 columns, pair, 32 columns, 8 rows.
    parts = tl.reshape(decode_int4(words), (ROWS // 16, 8, 4, 2, 2, 2, 2, 2))
    return tl.reshape(tl.permute(parts, (0, 7, 1, 6, 3, 4, 2, 5)), (ROWS, 64))


@triton.jit
def both_fragments(words, ROWS: tl.constexpr):
    """The same as weights [ROWS, 32], twice."""
    parts = tl.reshape(decode_int4(words), (ROWS // 16, 8, 4, 2, 2, 2, 2, 2))
    low, high = tl.split(tl.permute(parts, (0, 7, 1, 3, 4, 2, 5, 6)))
    return tl.reshape(low, (ROWS, 32)), tl.reshape(high, (ROWS, 32))


@triton.jit
def load_x_twice(x, source, live, first_k, in_features, EVEN: tl.constexpr, BLOCK_T: tl.constexpr):
    """Activations [64, 2 * BLOCK_T]: the first 32 columns of k for the first BLOCK_T, the others for the others."""
    k = first_k + tl.arange(0, 64)
    mine = (tl.arange(0, 64) // 32)[:, None] == (tl.arange(0, 2 * BLOCK_T) // BLOCK_T)[None, :]
    twice = tl.reshape(tl.permute(tl.join(source, source), (1, 0)), (2 * BLOCK_T,))
    inside = mine & tl.reshape(tl.permute(tl.join(live, live), (1, 0)), (2 * BLOCK_T,))[None, :]
    if not EVEN:
        inside = inside & (k < in_features)[:, None]
    return tl.load(x + twice[None, :] * in_features + k[:, None], mask=inside, other=0.0).to(tl.bfloat16)


@triton.jit
def half_scale(word, HALF: tl.constexpr):
    """One of two float16 in 32 bits, as float32."""
    return (word >> HALF * 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def add_step(
    sums, codes, scales, x, source, live, step, in_features, stride, width,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """sums [ROWS, BLOCK_T] plus one step over k: two groups of integers, a block of fp8, 64 columns of bf16.

    codes, scales: where the ROWS rows begin. stride: bytes of a row of tiles (bf16: columns of a row); width: scales
    of a step (bf16: rows that are left).
    """
    row = tl.arange(0, ROWS)
    if KIND == BF16:
        k = step * 64 + tl.arange(0, 64)
        weights = tl.load(
            codes + row.to(tl.int64)[:, None] * stride + k[None, :],
            mask=(row < width)[:, None] & (k < stride)[None, :],
            other=0.0,
        )
        sums = tl.dot(weights, load_x(x, source, live, step * 64, in_features, 64, EVEN), sums)
    elif KIND == FP8:
        part = tl.zeros_like(sums)
        for i in tl.static_range(4):
            tile = decode_fp8(load_tiles(codes, step * 4 + i, stride, ROWS, 2048))
            xs = load_x(x, source, live, step * 128 + i * 32, in_features, 32, EVEN)
            part = tl.dot(fragment(tile, ROWS), xs, part)
        sums += part * tl.load(scales + step * width + row // 64)[:, None]
    else:
        word = tl.load(scales + step * width + row)  # two float16
        if KIND == INT4 and GROUP == 32 and BLOCK_T <= 32:
            # Few tokens: both groups in one product, each with columns of its own, so that it is waited for once.
            words = load_tiles(codes, step, stride, ROWS, 512)
            part = tl.dot(
                fragments(words, ROWS), load_x_twice(x, source, live, step * 64, in_features, EVEN, BLOCK_T)
            )
            low, high = tl.split(tl.permute(tl.reshape(part, (ROWS, 2, BLOCK_T)), (0, 2, 1)))
            sums += low * half_scale(word, 0)[:, None]
            sums += high * half_scale(word, 1)[:, None]
        else:
            for half in tl.static_range(2):
                part = tl.zeros_like(sums)
                first = step * 2 * GROUP + half * GROUP
                if KIND == INT8:
                    for i in tl.static_range(GROUP // 32):
                        raw = load_tiles(codes, first // 32 + i, stride, ROWS, 2048)
                        xs = load_x(x, source, live, first + i * 32, in_features, 32, EVEN)
                        part = tl.dot(fragment(decode_int8(raw), ROWS), xs, part)
                elif GROUP == 32:
                    low, high = both_fragments(load_tiles(codes, step, stride, ROWS, 512), ROWS)
                    xs = load_x(x, source, live, first, in_features, 32, EVEN)
                    part = tl.dot(high if half else low, xs, part)
                else:
                    for i in tl.static_range(GROUP // 64):
                        low, high = both_fragments(
                            load_tiles(codes, first // 64 + i, stride, ROWS, 512), ROWS
                        )
                        xs = load_x(x, source, live, first + i * 64, in_features, 32, EVEN)
                        part = tl.dot(low, xs, part)
                        xs = load_x(x, source, live, first + i * 64 + 32, in_features, 32, EVEN)
                        part = tl.dot(high, xs, part)
                sums += part * half_scale(word, half)[:, None]
    return sums


@triton.jit
def add_steps(
    sums, codes, scales, x, source, live, first, last, in_features, stride, width, KIND: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    for step in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        sums = add_step(
            sums, codes, scales, x, source, live, step, in_features, stride, width, KIND, GROUP, ROWS, BLOCK_T, EVEN,
        )  # fmt: skip
    return sums


@triton.jit
def begin_rows(codes, scales, first_row, size, stride, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Codes, scales and width (see `add_step`) from row first_row of a matrix of `size` rows."""
    row_tile = (first_row // 64).to(tl.int64)
    if KIND == BF16:
        codes, width = codes + first_row.to(tl.int64) * stride, size - first_row
    elif KIND == FP8:
        codes, scales, width = codes + row_tile * stride, scales + row_tile, (size + 63) // 64
    else:
        codes, scales, width = codes + row_tile * stride, scales + first_row, (size + 63) // 64 * 64
    return codes, scales, width


# ---- products -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_weighted", "out_rows"])
def matmul(
    x, codes_a, scales_a, codes_b, scales_b, codes_c, scales_c, rows, experts, row_weights, out, residual, gain,
    total, scaled, counters, size_a, size_b, size_c, expert_codes, expert_scales, num_experts, num_weighted, out_rows,
    in_features, steps, stride, DENSE: tl.constexpr, SHARED: tl.constexpr, WEIGHTED: tl.constexpr,
    FINISH: tl.constexpr, HAS_GAIN: tl.constexpr, SPLITS: tl.constexpr, IS_SPLIT: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, row tiles of all matrices, SPLITS or 1): products with up to three matrices side by side.

    out [SPLITS or 1, out_rows, size_a + size_b + size_c] float32; with SHARED, b is expert num_experts instead of a
    second matrix. WEIGHTED: results of the first num_weighted rows times row_weights[row]. DENSE: rows 0 to
    out_rows - 1 of expert 0; `rows` and `experts` are not read. FINISH, with one matrix: `finish_tile` of the sums,
    by the last of the splits; counters [row blocks * row tiles] are 0.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    codes, scales, size, column = codes_a, scales_a, size_a, 0
    total_size = size_a
    if DENSE:
        live = row < out_rows
        total_size = size_a + size_b + size_c
        tiles_a, tiles_b = (size_a + ROWS - 1) // ROWS, (size_b + ROWS - 1) // ROWS
        if tile >= tiles_a + tiles_b:
            tile -= tiles_a + tiles_b
            codes, scales, size, column = codes_c, scales_c, size_c, size_a + size_b
        elif tile >= tiles_a:
            tile -= tiles_a
            codes, scales, size, column = codes_b, scales_b, size_b, size_a
    else:
        # Written before the kernel before this one began, and not by way of this multiprocessor.
        expert = tl.load(experts + block, cache_modifier=".cg").to(tl.int64)
        if expert > num_experts or (expert == num_experts and not SHARED):
            return
        row = tl.load(rows + row, cache_modifier=".cg")
        live = row >= 0
        if SHARED and expert == num_experts:
            codes, scales = codes_b, scales_b
        else:
            codes, scales = codes_a + expert * expert_codes, scales_a + expert * expert_scales
    codes, scales, width = begin_rows(codes, scales, tile * ROWS, size, stride, KIND, ROWS)
    sums = tl.zeros([ROWS, BLOCK_T], tl.float32)
    per_split = (steps + SPLITS - 1) // SPLITS
    first = tl.program_id(2) * per_split
    wait()
    if IS_SPLIT or SPLITS == 1:
        sums = add_steps(
            sums, codes, scales, x, row, live, first, tl.minimum(first + per_split, steps), in_features, stride,
            width, KIND, GROUP, ROWS, BLOCK_T, EVEN, STAGES, UNROLL,
        )  # fmt: skip
    else:
        for split in range(SPLITS):
            part = tl.zeros([ROWS, BLOCK_T], tl.float32)
            first = split * per_split
            sums += add_steps(
                part, codes, scales, x, row, live, first, tl.minimum(first + per_split, steps), in_features, stride,
                width, KIND, GROUP, ROWS, BLOCK_T, EVEN, STAGES, UNROLL,
            )  # fmt: skip
    announce()
    if WEIGHTED:
        weights = tl.load(row_weights + row, mask=live & (row < num_weighted), other=1.0)
        sums = sums * weights[None, :]
    n = tile * ROWS + tl.arange(0, ROWS)
    at = (tl.program_id(2) * out_rows + row.to(tl.int64))[None, :] * total_size + (column + n)[:, None]
    inside = live[None, :] & (n < size)[:, None]
    if FINISH:
        if IS_SPLIT:
            tl.store(out + at, sums, mask=inside)
            if is_last(counters + block * tl.num_programs(1) + tile, SPLITS):
                at = row.to(tl.int64)[None, :] * total_size + n[:, None]
                sums = tl.zeros([ROWS, BLOCK_T], tl.float32)
                for split in tl.static_range(SPLITS):
                    part = out + tl.full([], out_rows, tl.int64) * split * total_size + at
                    sums += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
                finish_tile(sums, residual, gain, total, scaled, at, n, size, inside, HAS_GAIN)
        else:
            finish_tile(sums, residual, gain, total, scaled, at, n, size, inside, HAS_GAIN)
    else:
        tl.store(out + at, sums, mask=inside)


@triton.jit
def finish_tile(sums, residual, gain, total, scaled, at, n, size, inside, HAS_GAIN: tl.constexpr):
    """Adds the residual and rounds, the same times a norm's 1 + gain as what its products read."""
    sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    rounded = sums.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    if HAS_GAIN:
        factor = 1.0 + tl.load(gain + n, mask=n < size, other=0.0).to(tl.float32)
        tl.store(scaled + at, (rounded.to(tl.float32) * factor[:, None]).to(tl.bfloat16), mask=inside)


@triton.jit
def swiglu_of(gates, ups, limit):
    """min(silu(gates), limit) * clamp(ups), bf16. NaN stays NaN."""
    activated = tl.minimum(gates * tl.sigmoid(gates), limit, propagate_nan=tl.PropagateNan.ALL)
    ups = tl.minimum(ups, limit, propagate_nan=tl.PropagateNan.ALL)
    return (activated * tl.maximum(ups, -limit, propagate_nan=tl.PropagateNan.ALL)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["num_routed", "num_rows"])
def swiglu(
    x, gate, gate_scales, up, up_scales, shared_gate, shared_gate_scales, shared_up, shared_up_scales, rows, experts,
    row_scales, parts, counters, out, size, expert_codes, expert_scales, num_experts, num_routed, num_rows,
    limit, shared_limit, in_features, steps, stride, TOP_K: tl.constexpr, DENSE: tl.constexpr,
    SHARED: tl.constexpr, SCALED: tl.constexpr, SPLITS: tl.constexpr,
    IS_SPLIT: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, row tiles): out[row] bf16 [num_rows, size], `swiglu_of` gate and up of a row of x. IS_SPLIT:
    grid (row blocks, 2 * row tiles, SPLITS); a tile's last one adds up parts [SPLITS, 2, num_rows, size] float32.

    The row of x is row // TOP_K below num_routed, from there on row - num_routed: with SHARED, expert num_experts is
    the shared one. SCALED: products times row_scales of the row of x. DENSE
    as in `matmul`, with num_routed rows.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    codes, scales, other_codes, other_scales = gate, gate_scales, up, up_scales
    which = 0
    if IS_SPLIT:
        which, tile = tile % 2, tile // 2
    per_split = (steps + SPLITS - 1) // SPLITS
    first = tl.program_id(2) * per_split
    last = tl.minimum(first + per_split, steps)
    if DENSE:
        live = row < num_routed
    else:
        wait()
        expert = tl.load(experts + block).to(tl.int64)
        if expert > num_experts or (expert == num_experts and not SHARED):
            return
        row = tl.load(rows + row)
        live = row >= 0
        if SHARED and expert == num_experts:
            codes, scales, other_codes, other_scales = (
                shared_gate,
                shared_gate_scales,
                shared_up,
                shared_up_scales,
            )
            limit = shared_limit
        else:
            codes, scales = gate + expert * expert_codes, gate_scales + expert * expert_scales
            other_codes, other_scales = up + expert * expert_codes, up_scales + expert * expert_scales
    source = tl.where(row < num_routed, row // TOP_K, row - num_routed)
    n = tile * ROWS + tl.arange(0, ROWS)
    inside = live[None, :] & (n < size)[:, None]
    if IS_SPLIT:
        if which == 1:
            codes, scales = other_codes, other_scales
        codes, scales, width = begin_rows(codes, scales, tile * ROWS, size, stride, KIND, ROWS)
        if DENSE:
            wait()
        sums = add_steps(
            tl.zeros([ROWS, BLOCK_T], tl.float32), codes, scales, x, source, live, first, last, in_features, stride,
            width, KIND, GROUP, ROWS, BLOCK_T, EVEN, STAGES, UNROLL,
        )  # fmt: skip
        announce()
        at = row.to(tl.int64)[None, :] * size + n[:, None]
        plane = tl.full([], num_rows, tl.int64) * size
        tl.store(parts + (tl.program_id(2) * 2 + which) * plane + at, sums, mask=inside)
        if is_last(counters + block * (tl.num_programs(1) // 2) + tile, 2 * SPLITS):
            gates = tl.zeros([ROWS, BLOCK_T], tl.float32)
            ups = tl.zeros([ROWS, BLOCK_T], tl.float32)
            for split in tl.static_range(SPLITS):
                part = parts + split * 2 * plane + at
                gates += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
                ups += tl.load(part + plane, mask=inside, other=0.0, cache_modifier=".cg")
            if SCALED:
                factor = tl.load(row_scales + source, mask=live, other=0.0)[None, :]
                gates, ups = gates * factor, ups * factor
            tl.store(out + at, swiglu_of(gates, ups, limit), mask=inside)
    else:
        if DENSE:
            wait()
        codes, scales, width = begin_rows(codes, scales, tile * ROWS, size, stride, KIND, ROWS)
        other_codes, other_scales, _ = begin_rows(
            other_codes, other_scales, tile * ROWS, size, stride, KIND, ROWS
        )
        gates = tl.zeros([ROWS, BLOCK_T], tl.float32)
        ups = tl.zeros([ROWS, BLOCK_T], tl.float32)
        for split in range(SPLITS):
            gate_part = tl.zeros([ROWS, BLOCK_T], tl.float32)
            up_part = tl.zeros([ROWS, BLOCK_T], tl.float32)
            first = split * per_split
            for step in tl.range(
                first, tl.minimum(first + per_split, steps), num_stages=STAGES, loop_unroll_factor=UNROLL
            ):
                gate_part = add_step(
                    gate_part, codes, scales, x, source, live, step, in_features, stride, width, KIND, GROUP, ROWS,
                    BLOCK_T, EVEN,
                )  # fmt: skip
                up_part = add_step(
                    up_part, other_codes, other_scales, x, source, live, step, in_features, stride, width, KIND,
                    GROUP, ROWS, BLOCK_T, EVEN,
                )  # fmt: skip
            gates += gate_part
            ups += up_part
        announce()
        if SCALED:
            factor = tl.load(row_scales + source, mask=live, other=0.0)[None, :]
            gates, ups = gates * factor, ups * factor
        tl.store(
            out + row.to(tl.int64)[None, :] * size + n[:, None], swiglu_of(gates, ups, limit), mask=inside
        )
