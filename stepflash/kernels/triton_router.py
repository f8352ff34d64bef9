# mypy: ignore-errors
"""Device code of the router and of sorting tokens by expert, in Triton; `cuda_moe.py` launches it."""

import triton
import triton.language as tl


@triton.jit
def router_logits(
    x, weight, out, num_tokens, num_experts, in_features, per_split, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks, expert blocks, splits): out [splits, num_tokens, num_experts], float32 throughout."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    sums = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    begin = tl.program_id(2) * per_split
    for first in range(begin, tl.minimum(begin + per_split, in_features), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < in_features
        weights = tl.load(
            weight + expert[:, None] * in_features + k[None, :],
            mask=(expert < num_experts)[:, None] & inside[None, :],
            other=0.0,
        )
        tokens = tl.load(
            x + token[None, :].to(tl.int64) * in_features + k[:, None],
            mask=(token < num_tokens)[None, :] & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(weights, tokens.to(tl.float32), sums, input_precision="ieee")
    at = (tl.program_id(2) * num_tokens + token).to(tl.int64)[None, :] * num_experts + expert[:, None]
    tl.store(out + at, sums, mask=(token < num_tokens)[None, :] & (expert < num_experts)[:, None])


@triton.jit
def choose_experts(
    logits, bias, topk_ids, topk_weights, num_tokens, num_experts, scaling_factor, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens,): the best of sigmoid(logits) + bias, ties to the lower expert; as `reference.route`."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < num_experts
    total = tl.zeros([BLOCK_E], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(logits + (split * num_tokens + token) * num_experts + expert, mask=inside, other=0.0)
    probability = tl.sigmoid(total)
    ranked = probability
    if HAS_BIAS:
        ranked += tl.load(bias + expert, mask=inside, other=0.0)
    # NaN is taken first, so that the token it belongs to shows it.
    ranked = tl.where(ranked == ranked, ranked, float("inf"))
    ranked = tl.where(inside, ranked, float("-inf"))
    place = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_K], tl.int32)
    chosen = tl.zeros([BLOCK_K], tl.float32)
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(ranked, 0)
        here = expert == best
        ids = tl.where(place == choice, best, ids)
        chosen = tl.where(place == choice, tl.sum(tl.where(here, probability, 0.0), 0), chosen)
        ranked = tl.where(here, float("-inf"), ranked)
    weights = chosen / (tl.sum(chosen, 0) + 1e-20) * scaling_factor
    tl.store(topk_ids + token * TOP_K + place, ids.to(tl.int64), mask=place < TOP_K)
    tl.store(topk_weights + token * TOP_K + place, weights, mask=place < TOP_K)


@triton.jit
def group_rows(
    ids, rows, experts, first_blocks, num_rows, num_experts, num_blocks, num_shared_blocks, num_tokens,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: rows 0 .. num_rows - 1 sorted by expert in blocks of BLOCK_T, -1 where a block is not full.

    The first num_shared_blocks hold rows num_rows .. num_rows + num_tokens - 1 of expert num_experts; blocks that are
    not needed have expert num_experts + 1. first_blocks [BLOCK_E] is room to work in.
    """
    lane = tl.arange(0, BLOCK_R)
    expert = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for begin in range(0, num_rows, BLOCK_R):
        found = tl.load(ids + begin + lane, mask=begin + lane < num_rows, other=-1).to(tl.int32)
        counts += tl.sum((found[:, None] == expert[None, :]).to(tl.int32), 0)
    blocks = (counts + BLOCK_T - 1) // BLOCK_T
    first = num_shared_blocks + tl.cumsum(blocks, 0) - blocks
    tl.store(first_blocks + expert, first)
    entry = tl.arange(0, 1024)
    for begin in range(0, num_blocks * BLOCK_T, 1024):
        place = begin + entry
        shared = tl.where(place < num_tokens, num_rows + place, -1)
        tl.store(
            rows + place,
            tl.where(place < num_shared_blocks * BLOCK_T, shared, -1),
            mask=place < num_blocks * BLOCK_T,
        )
    for begin in range(0, num_blocks, 1024):
        place = begin + entry
        none = tl.where(place < num_shared_blocks, num_experts, num_experts + 1)
        tl.store(experts + place, none, mask=place < num_blocks)
    tl.debug_barrier()  # what follows overwrites some of that, and reads first_blocks
    for turn in range(tl.max(blocks, 0)):
        tl.store(experts + first + turn, expert, mask=turn < blocks)
    every = tl.arange(0, ALL_ROWS)
    all_ids = tl.load(ids + every, mask=every < num_rows, other=-1).to(tl.int32)
    for begin in range(0, num_rows, BLOCK_R):
        row = begin + lane
        inside = row < num_rows
        mine = tl.load(ids + row, mask=inside, other=0).to(tl.int32)
        before = (all_ids[None, :] == mine[:, None]) & (every[None, :] < row[:, None])
        rank = tl.sum(before.to(tl.int32), 1)
        block = tl.load(first_blocks + mine, mask=inside, other=0)
        tl.store(rows + block * BLOCK_T + rank, row, mask=inside)
