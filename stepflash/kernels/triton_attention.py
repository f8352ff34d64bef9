# mypy: ignore-errors
"""Device code of paged attention and its cache, in Triton; `cuda.py` launches it.

Keys are taken in chunks of CHUNK absolute positions. A chunk's softmax starts from nothing and chunks are merged in
ascending order, whether one program walks through all of them (prefill) or each is a program of its own (split-KV
decode, merged by `merge_splits`): a query's sums have the same order whatever else is in the batch. Keys that a
query must not see add exactly nothing.

A program serves BLOCK_Q queries of all heads of one group, so that a tile of keys and values is read once for them.
"""

import triton
import triton.language as tl

from stepflash.kernels.triton_norm import as_int8
from stepflash.kernels.triton_start import announce, enter, fetch, wait


@triton.jit
def find_sequence(cu_seqlens, num_seqs, place, BLOCK_Q: tl.constexpr, GAP: tl.constexpr):
    """The last sequence s with cu_seqlens[s] // BLOCK_Q + s * GAP <= place.

    With GAP 1, place counts query blocks: a sequence may need one more than its share of num_tokens / BLOCK_Q.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK_Q + middle * GAP <= place:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def visible_from(position, window, first_key):
    """The oldest key that a query at `position` may see."""
    oldest = first_key
    if window > 0:
        oldest = tl.maximum(first_key, position - window + 1)
    return tl.maximum(oldest, 0)


@triton.jit
def merge(peak, total, sums, other_peak, other_total, other_sums):
    """Two softmaxes over disjoint keys as one; one without keys (peak -inf) changes no bit of the other."""
    new_peak = tl.maximum(peak, other_peak)
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    mine, theirs = tl.exp(peak - safe), tl.exp(other_peak - safe)
    return new_peak, total * mine + other_total * theirs, sums * mine[:, None] + other_sums * theirs[:, None]


@triton.jit
def attend_chunk(
    queries, position, chunk, oldest, newest, kv_head, table, k_cache, v_cache, k_scale, v_scale, window, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Softmax peak, total [ROWS] and weighted values [ROWS, BLOCK_D] over the keys oldest..newest of one chunk."""
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in range(
        tl.maximum(chunk * CHUNK, oldest // TILE * TILE), tl.minimum((chunk + 1) * CHUNK, newest + 1), TILE
    ):
        key = begin + tl.arange(0, TILE)
        held = (key >= oldest) & (key <= newest)
        block_id = tl.load(table + key // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
        row = (block_id * BLOCK_SIZE + key % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        at = row[:, None] * HEAD_DIM + dims[None, :]
        inside = held[:, None] & (dims[None, :] < HEAD_DIM)
        # What lies outside was perhaps never written; zero times NaN would be NaN.
        keys = tl.load(k_cache + at, mask=inside, other=0)
        values = tl.load(v_cache + at, mask=inside, other=0)
        if keys.dtype != queries.dtype:
            keys, values = keys.to(tl.float32).to(queries.dtype), values.to(tl.float32).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if INT8:
            scores = scores * tl.load(k_scale + row, mask=held, other=0.0)[None, :]
        seen = held[None, :] & (key[None, :] <= position[:, None])
        if window > 0:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - safe[:, None])
        fade = tl.exp(peak - safe)
        total = total * fade + tl.sum(weights, 1)
        if INT8:
            weights = weights * tl.load(v_scale + row, mask=held, other=0.0)[None, :]
        sums = sums * fade[:, None] + tl.dot(weights.to(queries.dtype), values, input_precision="ieee")
        peak = new_peak
    return peak, total, sums


@triton.jit
def fetch_chunk(
    chunk, oldest, newest, kv_head, table, k_cache, v_cache, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Asks for the keys and values of a chunk; all but the newest were there before this pass."""
    key = chunk * CHUNK + tl.arange(0, CHUNK)
    held = (key >= oldest) & (key <= newest)
    block_id = tl.load(table + key // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
    row = (block_id * BLOCK_SIZE + key % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
    LINE: tl.constexpr = 1024 // k_cache.dtype.element_ty.primitive_bitwidth  # elements
    dim = tl.arange(0, (BLOCK_D + LINE - 1) // LINE) * LINE
    at, inside = row[:, None] * HEAD_DIM + dim[None, :], held[:, None] & (dim[None, :] < HEAD_DIM)
    fetch(k_cache + at, inside)
    fetch(v_cache + at, inside)


@triton.jit
def store_result(
    out, gate, token, head, live, total, sums, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Divides by the softmax total (a query that saw nothing gets zeros), gates, and rounds once."""
    dims = tl.arange(0, BLOCK_D)
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    row = token * NUM_HEADS + head
    if HAS_GATE:
        result = result * tl.sigmoid(tl.load(gate + row, mask=live, other=0.0).to(tl.float32))[:, None]
    inside = live[:, None] & (dims[None, :] < HEAD_DIM)
    at = row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_seqs", "num_splits", "first_key"])
def attend(
    q, k_cache, v_cache, k_scale, v_scale, gate, block_table, seq_lens, cu_seqlens, out, split_peaks, split_totals,
    split_sums, num_seqs, table_stride, window, first_key, scale, num_splits,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, INT8: tl.constexpr, HAS_GATE: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, num_kv_heads, num_splits or 1). SPLIT: one chunk a program, left for `merge_splits`."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    seq = find_sequence(cu_seqlens, num_seqs, block, BLOCK_Q, 1)
    start = tl.load(cu_seqlens + seq)
    count = tl.load(cu_seqlens + seq + 1) - start
    first_query = (block - (start // BLOCK_Q + seq)) * BLOCK_Q
    if first_query >= count:
        return
    length = tl.load(seq_lens + seq)
    ROWS: tl.constexpr = BLOCK_Q * GROUP_ROWS
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    query, member = first_query + rows // GROUP_ROWS, rows % GROUP_ROWS
    live = (query < count) & (member < GROUP)
    token, head = start + query, kv_head * GROUP + member
    row = token * NUM_HEADS + head
    position = length - count + query
    oldest = visible_from(length - count + first_query, window, first_key)
    newest = tl.minimum(length - count + first_query + BLOCK_Q, length) - 1
    table = block_table + seq.to(tl.int64) * table_stride
    chunk = oldest // CHUNK
    if SPLIT:
        chunk += tl.program_id(2)
        if chunk > newest // CHUNK:
            return
        fetch_chunk(
            chunk, oldest, newest, kv_head, table, k_cache, v_cache, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_D,
            CHUNK,
        )  # fmt: skip
    wait()
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :],
        mask=live[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    queries = queries.to(tl.float32) if WIDE else queries.to(tl.bfloat16)
    if SPLIT:
        peak, total, sums = attend_chunk(
            queries, position, chunk, oldest, newest, kv_head, table, k_cache, v_cache, k_scale, v_scale, window,
            scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS, BLOCK_D, CHUNK, TILE, INT8,
        )  # fmt: skip
        announce()
        part = row.to(tl.int64) * num_splits + tl.program_id(2)
        tl.store(split_peaks + part, peak, mask=live)
        tl.store(split_totals + part, total, mask=live)
        tl.store(split_sums + part[:, None] * BLOCK_D + dims[None, :], sums, mask=live[:, None])
    else:
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for turn in range(chunk, newest // CHUNK + 1):
            other_peak, other_total, other_sums = attend_chunk(
                queries, position, turn, oldest, newest, kv_head, table, k_cache, v_cache, k_scale, v_scale,
                window, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS, BLOCK_D, CHUNK, TILE, INT8,
            )  # fmt: skip
            peak, total, sums = merge(peak, total, sums, other_peak, other_total, other_sums)
        announce()
        store_result(out, gate, token, head, live, total, sums, NUM_HEADS, HEAD_DIM, BLOCK_D, HAS_GATE)


@triton.jit(do_not_specialize=["num_seqs", "num_splits", "first_key"])
def merge_splits(
    gate, seq_lens, cu_seqlens, out, split_peaks, split_totals, split_sums, num_seqs, window, first_key, num_splits,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, NUM_HEADS): the chunks of one token in ascending order."""
    announce()
    token = tl.program_id(0)
    seq = find_sequence(cu_seqlens, num_seqs, token, 1, 0)
    start = tl.load(cu_seqlens + seq)
    first_position = tl.load(seq_lens + seq) - (tl.load(cu_seqlens + seq + 1) - start)
    query = token - start
    oldest = visible_from(
        first_position + query // BLOCK_Q * BLOCK_Q, window, first_key
    )  # of its query block
    one, dims = tl.arange(0, 1), tl.arange(0, BLOCK_D)
    head = tl.program_id(1) + one
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, BLOCK_D], tl.float32)
    row = (token * NUM_HEADS + head).to(tl.int64)
    chunks = (first_position + query) // CHUNK - oldest // CHUNK + 1
    wait()
    for first in range(0, chunks, 16):
        for i in tl.static_range(16):  # so many loads are under way at once
            part = row * num_splits + first + i
            inside = first + i + one < chunks
            other_peak = tl.load(split_peaks + part, mask=inside, other=float("-inf"))
            other_total = tl.load(split_totals + part, mask=inside, other=0.0)
            other_sums = tl.load(
                split_sums + part[:, None] * BLOCK_D + dims[None, :], mask=inside[:, None], other=0.0
            )
            peak, total, sums = merge(peak, total, sums, other_peak, other_total, other_sums)
    store_result(out, gate, token, head, one == 0, total, sums, NUM_HEADS, HEAD_DIM, BLOCK_D, HAS_GATE)


@triton.jit
def write_slots(
    k, v, k_cache, v_cache, k_scales, v_scales, slot_mapping, k_stride, v_stride, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, 2 * NUM_KV_HEADS): one head of a token into its slot, keys then values; int8 with a scale,
    peak / 127."""
    enter()
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    source, cache, scales, stride = k, k_cache, k_scales, k_stride
    if head >= NUM_KV_HEADS:
        source, cache, scales, stride = v, v_cache, v_scales, v_stride
        head -= NUM_KV_HEADS
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM
    values = tl.load(source + token.to(tl.int64) * stride + head * HEAD_DIM + dims, mask=inside, other=0.0)
    row = slot * NUM_KV_HEADS + head
    if INT8:
        values, peak = as_int8(values.to(tl.float32), 0)
        tl.store(scales + row, peak / 127.0)
    tl.store(cache + row * HEAD_DIM + dims, values.to(cache.dtype.element_ty), mask=inside)
