"""The feed-forward block on CUDA devices: router, tokens sorted by expert, experts, shared expert, residual.

Nothing here waits for the device. Activations enter as bf16 for every format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from stepflash.kernels import cuda_matmul, cuda_norm, reference, triton_finish, triton_matmul, triton_router
from stepflash.kernels.cuda_norm import rms_norm
from stepflash.kernels.formats import Format
from stepflash.kernels.triton_start import OVERLAP

ROUTER_TOKENS, ROUTER_EXPERTS, ROUTER_COLUMNS = 16, 8, 512
MAX_GROUPED_ROWS = 512  # that one program sorts; more are sorted by PyTorch


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows in blocks of block_t, an expert each, the shared one's first; see `triton_router.group`."""

    rows: Tensor  # [num_blocks * block_t] int32
    experts: Tensor  # [num_blocks] int32
    block_t: int
    num_shared: int  # blocks


def route(
    x: Tensor, router_weight: Tensor, router_bias: Tensor | None, top_k: int, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    return _route(x, None, 0.0, router_weight, router_bias, top_k, scaling_factor, None)[:2]


def _route(
    x: Tensor,
    before: Tensor | None,
    eps: float,
    router_weight: Tensor,
    router_bias: Tensor | None,
    top_k: int,
    scaling_factor: float,
    groups: Groups | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts and weights [num_tokens, top_k]. With `before`, x is that times a norm's 1 + weight: also what the norm
    multiplies rows with. Fills in `groups`."""
    (num_tokens, size), num_experts = x.shape, router_weight.shape[0]
    topk_ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=x.device)
    topk_weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=x.device)
    scales = torch.empty(0 if before is None else num_tokens, dtype=torch.float32, device=x.device)
    if not num_tokens:
        return topk_ids, topk_weights, scales
    splits, block_e = cdiv(size, ROUTER_COLUMNS), next_power_of_2(num_experts)
    logits = torch.empty((splits, num_tokens, num_experts), dtype=torch.float32, device=x.device)
    grid = (cdiv(num_tokens, ROUTER_TOKENS), cdiv(num_experts, ROUTER_EXPERTS), splits)
    triton_router.router_logits[grid](
        x.contiguous(), router_weight, logits, num_tokens, num_experts, size, BLOCK_T=ROUTER_TOKENS,
        BLOCK_E=ROUTER_EXPERTS, BLOCK_K=ROUTER_COLUMNS, **OVERLAP,
    )  # fmt: skip
    grouped = groups or Groups(topk_ids, topk_ids, 8, 0)
    first_blocks = torch.empty(block_e if groups else 0, dtype=torch.int32, device=x.device)
    triton_router.choose_experts[(num_tokens,)](
        logits, logits if router_bias is None else router_bias, x if before is None else before, scales, topk_ids,
        topk_weights, grouped.rows, grouped.experts, first_blocks, cuda_matmul.counters(x.device), num_tokens,
        num_experts, grouped.experts.numel(), grouped.num_shared, size, eps, scaling_factor,
        HAS_BIAS=router_bias is not None, SCALED=before is not None, GROUPED=groups is not None, SPLITS=splits,
        TOP_K=top_k, BLOCK_E=block_e, BLOCK_K=next_power_of_2(top_k), BLOCK_X=next_power_of_2(size),
        BLOCK_T=grouped.block_t, BLOCK_R=16, ALL_ROWS=next_power_of_2(num_tokens * top_k) if groups else 1,
        num_warps=4, **OVERLAP,
    )  # fmt: skip
    return topk_ids, topk_weights, scales


def empty_groups(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    with_shared: bool,
    formats: Sequence[int],
    device: torch.device,
) -> Groups:
    """As many blocks as could be needed, so that nothing waits for the counts."""
    num_rows = num_tokens * top_k
    # About as many as an expert gets of a large batch, and no more than it can get of a small one.
    block_t = cuda_matmul.block_t_of(min(num_tokens, 3 * num_rows // (2 * num_experts)), formats)
    shared_blocks = cdiv(num_tokens, block_t) if with_shared else 0
    most = shared_blocks + min(num_rows, cdiv(num_rows, block_t) + num_experts)
    rows = torch.empty(most * block_t, dtype=torch.int32, device=device)
    experts = torch.empty(most, dtype=torch.int32, device=device)
    return Groups(rows, experts, block_t, shared_blocks)


def group_by_expert(topk_ids: Tensor, num_experts: int, with_shared: bool, formats: Sequence[int]) -> Groups:
    """Rows token * top_k + choice sorted by expert; with the shared expert its rows, one a token, behind them."""
    (num_tokens, top_k), num_rows, device = topk_ids.shape, topk_ids.numel(), topk_ids.device
    groups = empty_groups(num_tokens, top_k, num_experts, with_shared, formats, device)
    rows, experts, block_t, shared_blocks = groups.rows, groups.experts, groups.block_t, groups.num_shared
    most = experts.numel()
    if num_rows <= MAX_GROUPED_ROWS:
        block_e = next_power_of_2(num_experts)
        first_blocks = torch.empty(block_e, dtype=torch.int32, device=device)
        triton_router.group_rows[(1,)](
            topk_ids, rows, experts, first_blocks, num_rows, num_experts, most, shared_blocks, num_tokens,
            BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_R=16, ALL_ROWS=next_power_of_2(num_rows), num_warps=8,
            **OVERLAP,
        )  # fmt: skip
        return groups
    flat = topk_ids.flatten().long()
    counts = torch.zeros(num_experts, dtype=torch.long, device=device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    blocks = (counts + block_t - 1) // block_t
    sorted_ids, order = flat.sort(stable=True)
    rank = torch.arange(num_rows, device=device) - (counts.cumsum(0) - counts)[sorted_ids]
    last_blocks = shared_blocks + blocks.cumsum(0)
    rows.fill_(-1)
    rows[:num_tokens] = torch.arange(num_rows, num_rows + num_tokens, device=device) if with_shared else -1
    rows[(last_blocks - blocks)[sorted_ids] * block_t + rank] = order.int()
    experts.copy_(torch.searchsorted(last_blocks, torch.arange(most, device=device), right=True))
    experts += (experts == num_experts).int()  # not needed
    experts[:shared_blocks] = num_experts
    return groups


def _gate_and_up(
    x: Tensor,
    packed: Sequence[Tensor],
    shared: Sequence[Tensor],
    fmt: Format,
    size: int,
    limits: tuple[float | None, float | None],
    groups: Groups | None,
    num_experts: int,
    top_k: int,
    scales: Tensor | None = None,
) -> Tensor:
    """What the down projection reads, [rows, size] bf16: top_k rows a token, then with `shared` one more a token.

    Without groups every token meets the one expert there is. Products count times the token's entry of `scales`.
    """
    num_tokens, hidden_size = x.shape
    gate, up = (cuda_matmul.view(w, fmt, size, hidden_size) for w in packed[:2])
    shared_gate, shared_up = (cuda_matmul.view(w, fmt, size, hidden_size) for w in shared[:2] or packed[:2])
    num_routed = num_tokens * top_k
    num_rows = num_routed + (num_tokens if shared else 0)
    block_t = cuda_matmul.block_t_of(num_tokens, [fmt]) if groups is None else groups.block_t
    num_blocks = cdiv(num_tokens, block_t) if groups is None else groups.experts.numel()
    is_split = block_t <= 32
    # Tiles of 128 rows are fewer.
    most = 3 if fmt == Format.INT4_G32 else 2
    splits = max(1, min(most, hidden_size // (2 * cuda_matmul.MIN_SPLIT_COLUMNS)))
    tile = cuda_matmul.tile_of(fmt, size, hidden_size, block_t, is_pair=not is_split)
    row_tiles = cdiv(size, tile["ROWS"])
    hidden = torch.empty((num_rows, size), dtype=torch.bfloat16, device=x.device)
    parts = torch.empty((splits, 2, num_rows, size) if is_split else 0, dtype=torch.float32, device=x.device)
    rows, experts = (hidden, hidden) if groups is None else (groups.rows, groups.experts)
    limit, shared_limit = (math.inf if value is None else value for value in limits)
    assert not is_split or num_blocks * row_tiles <= cuda_matmul.MAX_COUNTERS
    triton_matmul.swiglu[(num_blocks, 2 * row_tiles, splits) if is_split else (num_blocks, row_tiles)](
        x, gate.codes, gate.scales, up.codes, up.scales, shared_gate.codes, shared_gate.scales, shared_up.codes,
        shared_up.scales, rows, experts, hidden if scales is None else scales, parts, cuda_matmul.counters(x.device),
        hidden, size, gate.expert_codes, gate.expert_scales, num_experts, num_routed,
        num_rows, limit, shared_limit, hidden_size, gate.steps, gate.stride, TOP_K=top_k,
        DENSE=groups is None, SHARED=bool(shared), SCALED=scales is not None, SPLITS=splits, IS_SPLIT=is_split,
        **tile, **gate.constants, **OVERLAP,
    )  # fmt: skip
    return hidden


def routed(
    x: Tensor,
    packed: Sequence[Tensor],
    formats: Sequence[int],
    size: int,
    limits: tuple[float | None, float | None],
    topk_weights: Tensor,
    groups: Groups,
    num_experts: int,
    shared: Sequence[Tensor],
    scales: Tensor | None = None,
) -> Tensor:
    """Outputs [num_tokens * top_k, hidden_size] float32 of every row's expert, weighted; those of the shared expert,
    if it goes along (its formats and size are the experts'), behind them: [.. + num_tokens, hidden_size].

    `limits`: of the experts and of the shared one. `scales` as in `_gate_and_up`.
    """
    (num_tokens, hidden_size), top_k = x.shape, topk_weights.shape[1]
    fmt = Format(formats[0])
    hidden = _gate_and_up(x, packed, shared, fmt, size, limits, groups, num_experts, top_k, scales)
    fmt = Format(formats[2])
    down = cuda_matmul.view(packed[2], fmt, hidden_size, size)
    shared_down = cuda_matmul.view(shared[2], fmt, hidden_size, size) if shared else down
    out = torch.empty((hidden.shape[0], hidden_size), dtype=torch.float32, device=x.device)
    tile = cuda_matmul.tile_of(fmt, hidden_size, size, groups.block_t)
    triton_matmul.matmul[(groups.experts.numel(), cdiv(hidden_size, tile["ROWS"]), 1)](
        hidden, down.codes, down.scales, shared_down.codes, shared_down.scales, down.codes, down.scales,
        groups.rows, groups.experts, topk_weights, out, out, out, out, out, out, hidden_size, 0, 0,
        down.expert_codes, down.expert_scales, num_experts, num_tokens * top_k, hidden.shape[0], size, down.steps,
        down.stride, DENSE=False, SHARED=bool(shared), WEIGHTED=True, FINISH=False, HAS_GAIN=False, SPLITS=1,
        IS_SPLIT=False, **tile, **down.constants, **OVERLAP,
    )  # fmt: skip
    return out


def dense(
    x: Tensor, packed: Sequence[Tensor], formats: Sequence[int], size: int, limit: float | None
) -> Tensor:
    """A SwiGLU block that every token passes: parts [parts, num_tokens, hidden_size] float32, added in order."""
    hidden = _gate_and_up(x, packed, (), Format(formats[0]), size, (limit, limit), None, 1, 1)
    fmt, hidden_size = Format(formats[2]), x.shape[1]
    return cuda_matmul.matmul(
        hidden, [(packed[2], fmt, hidden_size)], cuda_matmul.num_splits(hidden_size, size)
    )


def moe(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    top_k: int,
    scaling_factor: float,
    experts: Sequence[Tensor],
    expert_formats: Sequence[int],
    num_experts: int,
    expert_size: int,
    limit: float | None,
    shared: Sequence[Tensor],
    shared_formats: Sequence[int],
    shared_size: int,
    shared_limit: float | None,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if not cuda_matmul.has_kernels([*expert_formats, *shared_formats]):
        return reference.moe(
            x, norm_weight, eps, router_weight, router_bias, top_k, scaling_factor, experts, expert_formats,
            num_experts, expert_size, limit, shared, shared_formats, shared_size, shared_limit, topk_ids,
            topk_weights, residual,
        )  # fmt: skip
    if not x.shape[0]:
        return torch.empty_like(x)
    normed = x.contiguous() if norm_weight is None else rms_norm(x, norm_weight, eps)
    num_tokens = x.shape[0]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = parts = out  # stand-ins where there are none
    choices, num_parts = 0, 0
    together = bool(experts) and list(expert_formats) == list(shared_formats) and expert_size == shared_size
    if experts:
        if topk_ids is None or topk_weights is None:
            assert router_weight is not None
            topk_ids, topk_weights = route(normed, router_weight, router_bias, top_k, scaling_factor)
        choices = topk_ids.shape[1]
        rows = routed(
            normed, experts, expert_formats, expert_size, (limit, shared_limit), topk_weights.float().contiguous(),
            group_by_expert(topk_ids.contiguous(), num_experts, together, expert_formats), num_experts,
            shared if together else (),
        )  # fmt: skip
    if shared and together:
        parts, num_parts = rows[num_tokens * choices :], 1
    elif shared:
        parts = dense(normed, shared, shared_formats, shared_size, shared_limit)
        num_parts = parts.shape[0]
    _combine(rows, choices, parts, num_parts, residual, out, None)
    return out


def _combine(
    rows: Tensor,
    choices: int,
    parts: Tensor,
    num_parts: int,
    residual: Tensor | None,
    out: Tensor,
    gain: Tensor | None,
) -> Tensor:
    """Fills `out` in; with a gain what its norm's products read."""
    num_tokens, hidden_size = out.shape
    scaled = torch.empty(out.shape if gain is not None else 0, dtype=torch.bfloat16, device=out.device)
    block = min(1024, next_power_of_2(hidden_size))
    triton_finish.combine[(num_tokens, cdiv(hidden_size, block))](
        rows, parts, out if residual is None else residual.contiguous(), out if gain is None else gain, out, scaled,
        num_tokens, hidden_size, TOP_K=choices, PARTS=num_parts, HAS_RESIDUAL=residual is not None,
        HAS_GAIN=gain is not None, BLOCK=block, **OVERLAP,
    )  # fmt: skip
    return scaled


def feed_forward(
    x: Tensor,
    scaled: Tensor,
    eps: float,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    top_k: int,
    scaling_factor: float,
    experts: Sequence[Tensor],
    expert_formats: Sequence[int],
    num_experts: int,
    expert_size: int,
    limit: float | None,
    shared: Sequence[Tensor],
    shared_formats: Sequence[int],
    shared_size: int,
    shared_limit: float | None,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`moe` of a norm of x plus x, where the product of x and the norm's 1 + weight is there already, bf16; also what
    the next norm, of weight `gain`, makes of it. Only the shared expert, or one of the others' shape."""
    out = torch.empty_like(x)
    if not experts:
        scales = cuda_norm.row_scales(x, eps)
        hidden = _gate_and_up(
            scaled, shared, (), Format(shared_formats[0]), shared_size, (shared_limit, shared_limit), None, 1, 1,
            scales,
        )  # fmt: skip
        after = torch.empty(x.shape if gain is not None else 0, dtype=torch.bfloat16, device=x.device)
        fmt, size = Format(shared_formats[2]), x.shape[1]
        splits = cuda_matmul.num_finished_splits(size, shared_size, fmt)
        cuda_matmul.matmul(hidden, [(shared[2], fmt, size)], splits, cuda_matmul.Finish(x, out, gain, after))
        return out, after
    assert router_weight is not None
    num_tokens = x.shape[0]
    groups = empty_groups(num_tokens, top_k, num_experts, True, expert_formats, x.device)
    is_grouped = num_tokens * top_k <= MAX_GROUPED_ROWS
    topk_ids, topk_weights, scales = _route(
        scaled, x, eps, router_weight, router_bias, top_k, scaling_factor, groups if is_grouped else None,
    )  # fmt: skip
    if not is_grouped:
        groups = group_by_expert(topk_ids, num_experts, True, expert_formats)
    rows = routed(
        scaled, experts, expert_formats, expert_size, (limit, shared_limit), topk_weights, groups, num_experts,
        shared, scales,
    )  # fmt: skip
    return out, _combine(rows, top_k, rows[num_tokens * top_k :], 1, x, out, gain)
