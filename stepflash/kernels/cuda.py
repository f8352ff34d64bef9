"""The ops on CUDA devices: shapes, buffers and launches of the Triton kernels in `triton_*.py`.

`register` puts them behind the names in torch.ops.stepflash; `ops.py` does so when an op first sees a CUDA tensor
and Triton is there (it comes with CUDA builds of torch). Nothing here waits for the device. Signatures are those of
`reference.py`. GGUF's q4_k and q6_k weights still take the reference, which unpacks them at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepflash.kernels import kv_layout, reference, triton_attention, triton_matmul, triton_norm
from stepflash.kernels.formats import Format

# Fixed, so that a token's sums have one order: two lots of 16 rows waste little at decode and feed prefill.
BLOCK_M, BLOCK_N = 32, 64
ATTENTION_ROWS = 64  # query heads of a program: one and three drafted tokens of a group of 16
CHUNK, KEY_TILE = 512, 64  # keys of a split, of a tile

_library: torch.library.Library | None = None


def register() -> None:
    """Registers the kernels for CUDA tensors; further calls do nothing."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("stepflash", "IMPL")  # type: ignore[no-untyped-call]
    for kernel in (
        rms_norm, add_rms_norm, linear, moe, qk_norm_rope, qkv_gate, cache_write, paged_attention, cached_attention,
    ):  # fmt: skip
        _library.impl(kernel.__name__, kernel, "CUDA")  # type: ignore[no-untyped-call]


def _ceil(x: int, size: int) -> int:
    return -(-x // size)


def _power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


# ---- norms and rotation ------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    size = x.shape[-1]
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    if x.numel():
        added = x if residual is None else residual.contiguous()
        triton_norm.rms_norm[(x.numel() // size,)](
            x, added, weight, out, total, size, eps, _power_of_two(size), residual is not None
        )
    return out, total


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _norm_rope(q, q_weight, eps, cos, sin), _norm_rope(k, k_weight, eps, cos, sin)


def _norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    x = _heads_together(x)
    num_tokens, num_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        triton_norm.norm_rope[(num_tokens, num_heads)](
            x, weight, out, cos.contiguous(), sin.contiguous(), x.stride(0), eps, num_heads, head_dim,
            cos.shape[1], _power_of_two(head_dim),
        )  # fmt: skip
    return out


def _heads_together(x: Tensor) -> Tensor:
    """x [num_tokens, num_heads, head_dim] with a token's heads side by side; views into projections are."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


# ---- packed weights ----------------------------------------------------------------------------------------


def _is_supported(formats: Sequence[int]) -> bool:
    return not {Format.Q4_K, Format.Q6_K} & set(formats)


def _weight(packed: Tensor, fmt: Format, in_features: int) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Views of a packed weight [.., num_bytes] as codes and as scales, its padded k, and what kernels must know."""
    padded_k = _ceil(in_features, fmt.k_block) * fmt.k_block
    if fmt == Format.BF16:
        codes = packed.view(torch.bfloat16)
        return codes, codes, padded_k, {"KIND": 0, "GROUP": 1, "BLOCK_K": 64}
    if fmt == Format.FP8:
        return packed, packed.view(torch.float32), padded_k, {"KIND": 1, "GROUP": 128, "BLOCK_K": 64}
    kind = {"KIND": 3 if fmt.is_int4 else 2, "GROUP": fmt.group, "BLOCK_K": min(fmt.group, 64)}
    return packed, packed.view(torch.float16), padded_k, kind


def _one_group(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and experts of a dense product."""
    blocks = _ceil(num_rows, BLOCK_M)
    rows = torch.arange(blocks * BLOCK_M, dtype=torch.int32, device=device)
    return torch.where(rows < num_rows, rows, -1), torch.zeros(blocks, dtype=torch.int32, device=device)


def _group_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rows token * top_k + choice sorted by expert, each expert's padded to blocks, and the blocks' experts.

    As many blocks as could be needed, so that nothing waits for the counts; unused ones have expert num_experts.
    """
    flat = topk_ids.flatten().long()
    num_rows, device = flat.numel(), flat.device
    counts = torch.zeros(num_experts, dtype=torch.long, device=device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    sorted_ids, order = flat.sort(stable=True)
    place = torch.arange(num_rows, device=device) - (counts.cumsum(0) - counts)[sorted_ids]
    last_blocks = blocks.cumsum(0)
    most = min(num_rows, _ceil(num_rows, BLOCK_M) + num_experts)
    rows = torch.full((most * BLOCK_M,), -1, dtype=torch.int32, device=device)
    rows[(last_blocks - blocks)[sorted_ids] * BLOCK_M + place] = order.int()
    experts = torch.searchsorted(last_blocks, torch.arange(most, device=device), right=True)
    return rows, experts.int()


def _matmul(
    x: Tensor, packed: Tensor, fmt: Format, rows: Tensor, experts: Tensor, out: Tensor, weights: Tensor | None
) -> None:
    """out[row] = x[row] @ weight.T (times weights[row]); `packed` is [num_bytes] or [num_experts, num_bytes]."""
    codes, scales, padded_k, kind = _weight(packed.view(-1, packed.shape[-1]), fmt, x.shape[1])
    size = out.shape[1]
    triton_matmul.matmul[(experts.numel(), _ceil(size, BLOCK_N))](
        x, codes, scales, rows, experts, out if weights is None else weights, out, out.stride(0), codes.stride(0),
        scales.stride(0), x.shape[1], padded_k, size, codes.shape[0], WEIGHTED=weights is not None,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **kind,
    )  # fmt: skip


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[int],
    sizes: Sequence[int],
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Activations enter as bf16 for every format."""
    if not _is_supported(formats):
        return reference.linear(x, weights, formats, sizes, norm_weight, eps, gate, residual, dtype)
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    if gate is not None:
        heads = x.float().view(x.shape[0], gate.shape[1], -1) * torch.sigmoid(gate.float()).unsqueeze(-1)
        x = heads.flatten(-2).to(x.dtype)
    x = x.contiguous()
    out = torch.empty((x.shape[0], sum(sizes)), dtype=torch.float32, device=x.device)
    if x.shape[0]:
        rows, experts = _one_group(x.shape[0], x.device)
        columns = torch.split(out, list(sizes), 1)
        for packed, fmt, part in zip(weights, formats, columns, strict=True):
            _matmul(x, packed, Format(fmt), rows, experts, part, None)
    if residual is not None:
        out += residual.float()
    return out.to(dtype or x.dtype)


def _experts(
    x: Tensor,
    packed: Sequence[Tensor],
    formats: Sequence[int],
    size: int,
    limit: float | None,
    top_k: int,
    groups: tuple[Tensor, Tensor],
    weights: Tensor | None,
) -> Tensor:
    """Outputs [num_tokens * top_k, hidden_size] float32 of the experts that `groups` gives each row."""
    rows, experts = groups
    num_rows, (gate, up, down) = x.shape[0] * top_k, packed
    gate, up = gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1])
    codes, scales, padded_k, kind = _weight(gate, Format(formats[0]), x.shape[1])
    up_codes, up_scales, _, _ = _weight(up, Format(formats[1]), x.shape[1])
    hidden = torch.empty((num_rows, size), dtype=torch.bfloat16, device=x.device)
    triton_matmul.swiglu[(experts.numel(), _ceil(size, BLOCK_N))](
        x, codes, scales, up_codes, up_scales, rows, experts, hidden, codes.stride(0), scales.stride(0), x.shape[1],
        padded_k, size, codes.shape[0], 0.0 if limit is None else limit, TOP_K=top_k, LIMITED=limit is not None,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **kind,
    )  # fmt: skip
    out = torch.empty((num_rows, x.shape[1]), dtype=torch.float32, device=x.device)
    _matmul(hidden, down, Format(formats[2]), rows, experts, out, weights)
    return out


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
    """Activations enter as bf16 for every format; the router is the reference's."""
    if not _is_supported([*expert_formats, *shared_formats]):
        return reference.moe(
            x, norm_weight, eps, router_weight, router_bias, top_k, scaling_factor, experts, expert_formats,
            num_experts, expert_size, limit, shared, shared_formats, shared_size, shared_limit, topk_ids,
            topk_weights, residual,
        )  # fmt: skip
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_tokens, hidden_size = x.shape
    if not num_tokens:
        return out
    normed = x.contiguous() if norm_weight is None else rms_norm(x, norm_weight, eps)
    routed = dense = out  # stand-ins where there are none
    choices = 0
    if experts:
        if topk_ids is None or topk_weights is None:
            assert router_weight is not None
            topk_ids, topk_weights = reference.route(
                normed, router_weight, router_bias, top_k, scaling_factor
            )
        choices = topk_ids.shape[1]
        groups = _group_by_expert(topk_ids, num_experts)
        scales = topk_weights.float().contiguous()
        routed = _experts(normed, experts, expert_formats, expert_size, limit, choices, groups, scales)
    if shared:
        one = _one_group(num_tokens, x.device)
        dense = _experts(normed, shared, shared_formats, shared_size, shared_limit, 1, one, None)
    added = out if residual is None else residual.contiguous()
    block = min(1024, _power_of_two(hidden_size))
    triton_matmul.combine[(num_tokens, _ceil(hidden_size, block))](
        routed, dense, added, out, hidden_size, TOP_K=choices, HAS_SHARED=bool(shared),
        HAS_RESIDUAL=residual is not None, BLOCK=block,
    )  # fmt: skip
    return out


def qkv_gate(
    x: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, num_heads]
    q, k, v, gate = torch.split(linear(x, weights, formats, sizes, norm_weight, eps), sizes, -1)
    q, k, v = (part.view(x.shape[0], -1, head_dim) for part in (q, k, v))
    q, k = qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin)
    return q, k, v.contiguous(), gate.contiguous()


# ---- attention ---------------------------------------------------------------------------------------------


def cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    if not num_tokens:
        return
    for source, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        source = _heads_together(source)
        triton_attention.write_slots[(num_tokens, num_kv_heads)](
            source, cache, cache if scales is None else scales, slot_mapping.contiguous(), source.stride(0),
            num_kv_heads, head_dim, _power_of_two(head_dim), scales is not None,
        )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    window: int,
    scale: float,
    first_key: int = 0,
    gate: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Split over the keys where no sequence can have more than a few queries on average, else one pass."""
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, num_kv_heads, block_size = seq_lens.shape[0], k_cache.shape[2], kv_layout.block_size_of(k_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not num_tokens:
        return out
    group_rows = _power_of_two(num_heads // num_kv_heads)
    block_q = max(1, ATTENTION_ROWS // group_rows)
    num_splits = _ceil(block_table.shape[1] * block_size, CHUNK)
    if window:
        num_splits = min(num_splits, _ceil(window + block_q, CHUNK) + 1)
    split = num_splits > 1 and num_tokens <= block_q * num_seqs
    splits = num_splits if split else 1
    block_d = max(16, _power_of_two(head_dim))
    parts = (num_tokens, num_heads, splits) if split else (0,)
    peaks, totals = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
    sums = torch.empty((*parts, block_d), dtype=torch.float32, device=q.device)
    gates = out if gate is None else gate.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    wide = k_cache.dtype == torch.float32
    sizes = {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "GROUP_ROWS": group_rows,
        "BLOCK_Q": block_q, "BLOCK_D": block_d, "CHUNK": CHUNK, "HAS_GATE": gate is not None,
        "enable_fp_fusion": False,  # or two kernels could round the same merge differently
    }  # fmt: skip
    triton_attention.attend[(_ceil(num_tokens, block_q) + num_seqs, num_kv_heads, splits)](
        q.contiguous(), k_cache, v_cache, k_cache if k_scale is None else k_scale,
        v_cache if v_scale is None else v_scale, gates, block_table, seq_lens, cu_seqlens, out, peaks, totals, sums,
        num_seqs, block_table.stride(0), window, first_key, scale, splits, BLOCK_SIZE=block_size,
        TILE=KEY_TILE // 2 if wide else KEY_TILE, INT8=k_scale is not None, SPLIT=split, WIDE=wide, **sizes,
    )  # fmt: skip
    if split:
        triton_attention.merge_splits[(num_tokens, num_kv_heads)](
            gates,
            seq_lens,
            cu_seqlens,
            out,
            peaks,
            totals,
            sums,
            num_seqs,
            window,
            first_key,
            splits,
            **sizes,
        )
    return out


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    window: int,
    scale: float,
    first_key: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    cache_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return paged_attention(
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens, window, scale, first_key, None, k_scale, v_scale
    )  # fmt: skip
