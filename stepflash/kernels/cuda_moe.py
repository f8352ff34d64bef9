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

from stepflash.kernels import cuda_matmul, reference, triton_matmul, triton_router
from stepflash.kernels.cuda_norm import rms_norm
from stepflash.kernels.formats import Format
from stepflash.kernels.triton_start import OVERLAP

ROUTER_TOKENS, ROUTER_EXPERTS, ROUTER_COLUMNS = 16, 8, 512
MAX_GROUPED_ROWS = 512  # that one program sorts; more are sorted by PyTorch


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows in blocks of block_t, an expert each; see `triton_router.group_rows`."""

    rows: Tensor  # [num_blocks * block_t] int32
    experts: Tensor  # [num_blocks] int32
    block_t: int


def route(
    x: Tensor, router_weight: Tensor, router_bias: Tensor | None, top_k: int, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    (num_tokens, size), num_experts = x.shape, router_weight.shape[0]
    topk_ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=x.device)
    topk_weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=x.device)
    if not num_tokens:
        return topk_ids, topk_weights
    splits = cdiv(size, ROUTER_COLUMNS)
    logits = torch.empty((splits, num_tokens, num_experts), dtype=torch.float32, device=x.device)
    grid = (cdiv(num_tokens, ROUTER_TOKENS), cdiv(num_experts, ROUTER_EXPERTS), splits)
    triton_router.router_logits[grid](
        x.contiguous(), router_weight, logits, num_tokens, num_experts, size, BLOCK_T=ROUTER_TOKENS,
        BLOCK_E=ROUTER_EXPERTS, BLOCK_K=ROUTER_COLUMNS, **OVERLAP,
    )  # fmt: skip
    triton_router.choose_experts[(num_tokens,)](
        logits, logits if router_bias is None else router_bias, topk_ids, topk_weights, num_tokens, num_experts,
        scaling_factor, HAS_BIAS=router_bias is not None, SPLITS=splits, TOP_K=top_k,
        BLOCK_E=next_power_of_2(num_experts), BLOCK_K=next_power_of_2(top_k), num_warps=1,
        **OVERLAP,
    )  # fmt: skip
    return topk_ids, topk_weights


def group_by_expert(topk_ids: Tensor, num_experts: int, with_shared: bool) -> Groups:
    """Rows token * top_k + choice sorted by expert; with the shared expert its rows, one a token, behind them.

    As many blocks as could be needed, so that nothing waits for the counts.
    """
    num_tokens, num_rows = topk_ids.shape[0], topk_ids.numel()
    # About as many as an expert gets of a large batch, and no more than it can get of a small one.
    block_t = cuda_matmul.block_t_of(min(num_tokens, 3 * num_rows // (2 * num_experts)))
    shared_blocks = cdiv(num_tokens, block_t) if with_shared else 0
    most = shared_blocks + min(num_rows, cdiv(num_rows, block_t) + num_experts)
    device = topk_ids.device
    rows = torch.empty(most * block_t, dtype=torch.int32, device=device)
    experts = torch.empty(most, dtype=torch.int32, device=device)
    if num_rows <= MAX_GROUPED_ROWS:
        block_e = next_power_of_2(num_experts)
        first_blocks = torch.empty(block_e, dtype=torch.int32, device=device)
        triton_router.group_rows[(1,)](
            topk_ids, rows, experts, first_blocks, num_rows, num_experts, most, shared_blocks, num_tokens,
            BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_R=16, ALL_ROWS=next_power_of_2(num_rows), num_warps=8,
            **OVERLAP,
        )  # fmt: skip
        return Groups(rows, experts, block_t)
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
    return Groups(rows, experts, block_t)


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
) -> Tensor:
    """What the down projection reads, [rows, size] bf16: top_k rows a token, then with `shared` one more a token.

    Without groups every token meets the one expert there is.
    """
    num_tokens, hidden_size = x.shape
    gate, up = (cuda_matmul.view(w, fmt, size, hidden_size) for w in packed[:2])
    shared_gate, shared_up = (cuda_matmul.view(w, fmt, size, hidden_size) for w in shared[:2] or packed[:2])
    num_routed = num_tokens * top_k
    num_rows = num_routed + (num_tokens if shared else 0)
    block_t = cuda_matmul.block_t_of(num_tokens) if groups is None else groups.block_t
    num_blocks = cdiv(num_tokens, block_t) if groups is None else groups.experts.numel()
    is_split = block_t <= 32
    splits = max(1, min(2, hidden_size // (2 * cuda_matmul.MIN_SPLIT_COLUMNS)))
    tile = cuda_matmul.tile_of(fmt, size, hidden_size, block_t, is_pair=not is_split)
    row_tiles = cdiv(size, tile["ROWS"])
    hidden = torch.empty((num_rows, size), dtype=torch.bfloat16, device=x.device)
    out = hidden
    if is_split:
        out = torch.empty((splits, 2, num_rows, size), dtype=torch.float32, device=x.device)
    rows, experts = (out, out) if groups is None else (groups.rows, groups.experts)
    limit, shared_limit = (math.inf if value is None else value for value in limits)
    triton_matmul.swiglu[(num_blocks, 2 * row_tiles, splits) if is_split else (num_blocks, row_tiles)](
        x, gate.codes, gate.scales, up.codes, up.scales, shared_gate.codes, shared_gate.scales, shared_up.codes,
        shared_up.scales, rows, experts, out, size, gate.expert_codes, gate.expert_scales, num_experts, num_routed,
        num_rows, limit, shared_limit, hidden_size, gate.steps, gate.stride, TOP_K=top_k, DENSE=groups is None,
        SHARED=bool(shared), SPLITS=splits, IS_SPLIT=is_split, **tile, **gate.constants, **OVERLAP,
    )  # fmt: skip
    if is_split:
        block = min(1024, next_power_of_2(size))
        triton_matmul.activate[(num_rows, cdiv(size, block))](
            out,
            hidden,
            num_rows,
            size,
            num_routed,
            limit,
            shared_limit,
            SPLITS=splits,
            BLOCK=block,
            **OVERLAP,
        )
    return hidden


def routed(
    x: Tensor,
    packed: Sequence[Tensor],
    formats: Sequence[int],
    size: int,
    limits: tuple[float | None, float | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    shared: Sequence[Tensor],
) -> Tensor:
    """Outputs [num_tokens * top_k, hidden_size] float32 of every row's expert, weighted; those of the shared expert,
    if it goes along (its formats and size are the experts'), behind them: [.. + num_tokens, hidden_size].

    `limits`: of the experts and of the shared one.
    """
    (num_tokens, hidden_size), top_k = x.shape, topk_ids.shape[1]
    groups = group_by_expert(topk_ids, num_experts, bool(shared))
    hidden = _gate_and_up(x, packed, shared, Format(formats[0]), size, limits, groups, num_experts, top_k)
    fmt = Format(formats[2])
    down = cuda_matmul.view(packed[2], fmt, hidden_size, size)
    shared_down = cuda_matmul.view(shared[2], fmt, hidden_size, size) if shared else down
    out = torch.empty((hidden.shape[0], hidden_size), dtype=torch.float32, device=x.device)
    tile = cuda_matmul.tile_of(fmt, hidden_size, size, groups.block_t)
    triton_matmul.matmul[(groups.experts.numel(), cdiv(hidden_size, tile["ROWS"]), 1)](
        hidden, down.codes, down.scales, shared_down.codes, shared_down.scales, down.codes, down.scales,
        groups.rows, groups.experts, topk_weights, out, hidden_size, 0, 0, down.expert_codes, down.expert_scales,
        num_experts, num_tokens * top_k, hidden.shape[0], size, down.steps, down.stride, DENSE=False,
        SHARED=bool(shared), WEIGHTED=True, SPLITS=1, IS_SPLIT=False, **tile, **down.constants, **OVERLAP,
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
    num_tokens, hidden_size = x.shape
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
            normed, experts, expert_formats, expert_size, (limit, shared_limit), topk_ids.contiguous(),
            topk_weights.float().contiguous(), num_experts, shared if together else (),
        )  # fmt: skip
    if shared and together:
        parts, num_parts = rows[num_tokens * choices :], 1
    elif shared:
        parts = dense(normed, shared, shared_formats, shared_size, shared_limit)
        num_parts = parts.shape[0]
    block = min(1024, next_power_of_2(hidden_size))
    triton_matmul.combine[(num_tokens, cdiv(hidden_size, block))](
        rows, parts, out if residual is None else residual.contiguous(), out, num_tokens, hidden_size, TOP_K=choices,
        PARTS=num_parts, HAS_RESIDUAL=residual is not None, BLOCK=block,
        **OVERLAP,
    )  # fmt: skip
    return out
