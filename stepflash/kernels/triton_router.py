# mypy: ignore-errors
"""Device code of the router and of sorting tokens by expert, in Triton; `cuda_moe.py` launches it."""

import triton
import triton.language as tl

from stepflash.kernels.triton_norm import row_scale
from stepflash.kernels.triton_start import announce, enter, is_last, wait


@triton.jit(do_not_specialize=["num_tokens"])
def router_logits(
    x, weight, out, num_tokens, num_experts, in_features, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks, expert blocks, splits of BLOCK_K columns): out [splits, num_tokens, num_experts] float32.

    A token's sum is one reduction, whatever other tokens the program has.
    """
    announce()
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < in_features
    weights = tl.load(
        weight + expert[:, None] * in_features + k[None, :],
        mask=(expert < num_experts)[:, None] & inside[None, :],
        other=0.0,
    )
    wait()
    begin = tl.program_id(0) * BLOCK_T
    for token in range(begin, tl.minimum(begin + BLOCK_T, num_tokens)):
        wide = tl.full([], 0, tl.int64) + token
        values = tl.load(x + wide * in_features + k, mask=inside, other=0.0).to(tl.float32)
        sums = tl.sum(weights * values[None, :], 1)
        at = (tl.program_id(2) * num_tokens + wide) * num_experts + expert
        tl.store(out + at, sums, mask=expert < num_experts)


@triton.jit
def add_logits(logits, token, expert, mask, num_tokens, num_experts, SPLITS: tl.constexpr):
    """The sum over splits [SPLITS, num_tokens, num_experts] in order, of some experts."""
    total = tl.load(logits + token * num_experts + expert, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(logits + (split * num_tokens + token) * num_experts + expert, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_shared_blocks"])
def choose_experts(
    logits, bias, x, scales, topk_ids, topk_weights, rows, experts, first_blocks, counter, num_tokens, num_experts,
    num_blocks, num_shared_blocks, size, eps, scaling_factor, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    GROUPED: tl.constexpr, SPLITS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens,): the best of sigmoid(logits) + bias, ties to the lower expert; as `reference.route`.

    SCALED: logits times `row_scale` of x, which goes to `scales`. GROUPED: the last program does what `group` does.
    """
    enter()
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < num_experts
    sums = add_logits(logits, token, expert, inside, num_tokens, num_experts, SPLITS)
    factor = 1.0
    if SCALED:
        factor = row_scale(x, token, size, eps, BLOCK_X)
        tl.store(scales + token, factor)
    ranked = tl.sigmoid(sums * factor)
    if HAS_BIAS:
        ranked += tl.load(bias + expert, mask=inside, other=0.0)
    # NaN is taken first, so that the token it belongs to shows it.
    ranked = tl.where(ranked == ranked, ranked, float("inf"))
    ranked = tl.where(inside, ranked, float("-inf"))
    place = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_K], tl.int32)
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(ranked, 0)
        ids = tl.where(place == choice, best, ids)
        ranked = tl.where(expert == best, float("-inf"), ranked)
    # The chosen ones again: cheaper than to look them up in what the program holds.
    live = place < TOP_K
    chosen = tl.sigmoid(add_logits(logits, token, ids, live, num_tokens, num_experts, SPLITS) * factor)
    chosen = tl.where(live, chosen, 0.0)
    weights = chosen / (tl.sum(chosen, 0) + 1e-20) * scaling_factor
    tl.store(topk_ids + token * TOP_K + place, ids.to(tl.int64), mask=live)
    tl.store(topk_weights + token * TOP_K + place, weights, mask=live)
    if GROUPED:
        if num_tokens == 1:
            # Nothing to sort: each of its experts has a block.
            tl.store(experts + num_shared_blocks + place, ids, mask=live)
            tl.store(experts + place, num_experts, mask=place < num_shared_blocks)
            entry = tl.arange(0, BLOCK_T)[:, None]
            row = tl.where(entry == 0, place[None, :], -1)
            tl.store(rows + (num_shared_blocks + place[None, :]) * BLOCK_T + entry, row, mask=live[None, :])
            row = tl.where(entry == 0, TOP_K, -1 + place[None, :] * 0)
            tl.store(rows + place[None, :] * BLOCK_T + entry, row, mask=place[None, :] < num_shared_blocks)
        elif is_last(counter, num_tokens):
            group(
                topk_ids, rows, experts, first_blocks, num_tokens * TOP_K, num_experts, num_blocks, num_shared_blocks,
                num_tokens, BLOCK_T, BLOCK_E, BLOCK_R, ALL_ROWS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_shared_blocks", "num_tokens"])
def group_rows(
    ids, rows, experts, first_blocks, num_rows, num_experts, num_blocks, num_shared_blocks, num_tokens,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: `group`."""
    enter()
    group(
        ids, rows, experts, first_blocks, num_rows, num_experts, num_blocks, num_shared_blocks, num_tokens, BLOCK_T,
        BLOCK_E, BLOCK_R, ALL_ROWS,
    )  # fmt: skip


@triton.jit
def group(
    ids, rows, experts, first_blocks, num_rows, num_experts, num_blocks, num_shared_blocks, num_tokens,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows 0 .. num_rows - 1 sorted by expert in blocks of BLOCK_T, -1 where a block is not full.

    The first num_shared_blocks hold rows num_rows .. num_rows + num_tokens - 1 of expert num_experts; blocks that are
    not needed have expert num_experts + 1. first_blocks [BLOCK_E] is room to work in.
    """
    lane = tl.arange(0, BLOCK_R)
    expert = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for begin in range(0, num_rows, BLOCK_R):
        found = tl.load(ids + begin + lane, mask=begin + lane < num_rows, other=-1, cache_modifier=".cg").to(
            tl.int32
        )
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
    all_ids = tl.load(ids + every, mask=every < num_rows, other=-1, cache_modifier=".cg").to(tl.int32)
    for begin in range(0, num_rows, BLOCK_R):
        row = begin + lane
        inside = row < num_rows
        mine = tl.load(ids + row, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
        before = (all_ids[None, :] == mine[:, None]) & (every[None, :] < row[:, None])
        rank = tl.sum(before.to(tl.int32), 1)
        block = tl.load(first_blocks + mine, mask=inside, other=0)
        tl.store(rows + block * BLOCK_T + rank, row, mask=inside)
