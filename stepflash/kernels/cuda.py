"""The ops on CUDA devices: shapes, buffers and launches of the Triton kernels in `triton_*.py`.

`register` puts them behind the names in torch.ops.stepflash; `ops.py` does so when an op first sees a CUDA tensor
and Triton is there (it comes with CUDA builds of torch). Nothing here waits for the device. Signatures are those of
`reference.py`. Norms are in `cuda_norm.py`, the feed-forward block in `cuda_moe.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from stepflash.kernels import (
    cuda_matmul,
    cuda_norm,
    kv_layout,
    reference,
    triton_attention,
    triton_finish,
    triton_norm,
    triton_sampling,
)
from stepflash.kernels.cuda_moe import moe, route
from stepflash.kernels.cuda_norm import add_rms_norm, qk_norm_rope, rms_norm
from stepflash.kernels.formats import Format
from stepflash.kernels.triton_start import OVERLAP

HEAD_BLOCK = 8  # heads of a program that finishes projections
ATTENTION_ROWS = 64  # query heads of a program: one and three drafted tokens of a group of 16
# Fixed, so that a token's sums have one order: keys of a split, of a tile.
CHUNK, KEY_TILE = 128, 64

_library: torch.library.Library | None = None


def register() -> None:
    """Registers the kernels for CUDA tensors; further calls do nothing."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("stepflash", "IMPL")  # type: ignore[no-untyped-call]
    for kernel in (
        rms_norm, add_rms_norm, linear, route, moe, qk_norm_rope, qkv_gate, cache_write, paged_attention,
        cached_attention, best_tokens,
    ):  # fmt: skip
        _library.impl(kernel.__name__, kernel, "CUDA")  # type: ignore[no-untyped-call]


# ---- packed weights ----------------------------------------------------------------------------------------


def _side_by_side(
    x: Tensor, weights: Sequence[Tensor], formats: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """Products as parts [parts, num_tokens, sum(sizes)] float32, to be added in order."""
    if len(weights) <= 3 and len(set(formats)) == 1:
        together = [(w, Format(f), n) for w, f, n in zip(weights, formats, sizes, strict=True)]
        return cuda_matmul.matmul(x, together, cuda_matmul.num_splits(sum(sizes), x.shape[1]))
    apart = [
        cuda_matmul.finish(_side_by_side(x, [w], [f], [n]), None, torch.float32)
        for w, f, n in zip(weights, formats, sizes, strict=True)
    ]
    return torch.cat(apart, 1)[None]


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
    if not cuda_matmul.has_kernels(formats):
        return reference.linear(x, weights, formats, sizes, norm_weight, eps, gate, residual, dtype)
    if not x.shape[0]:
        return torch.empty((0, sum(sizes)), dtype=dtype or x.dtype, device=x.device)
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    x = x.contiguous()
    if gate is not None:
        x = _gated(x, gate.contiguous())
    parts = _side_by_side(x, weights, formats, sizes)
    return cuda_matmul.finish(parts, None if residual is None else residual.contiguous(), dtype or x.dtype)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    num_tokens, size = x.shape
    out, block = torch.empty_like(x), min(2048, next_power_of_2(size))
    triton_finish.gated[(num_tokens, cdiv(size, block))](
        x, gate, out, size, gate.shape[1], size // gate.shape[1], block, **OVERLAP
    )
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
    if not cuda_matmul.has_kernels(formats):
        return reference.qkv_gate(
            x, norm_weight, weights, formats, num_heads, num_kv_heads, head_dim, q_weight, k_weight, eps, cos, sin
        )  # fmt: skip
    num_tokens = x.shape[0]
    q, k, v = (
        torch.empty((num_tokens, heads, head_dim), dtype=x.dtype, device=x.device)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    gate = torch.empty((num_tokens, num_heads), dtype=x.dtype, device=x.device)
    if not num_tokens:
        return q, k, v, gate
    normed = rms_norm(x, norm_weight, eps)
    project_heads(
        normed, weights, formats, q_weight, k_weight, eps, cos, sin, (q, k, v, gate), None, None, (None, None)
    )
    return q, k, v, gate


def project_heads(
    x: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[int],
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    before: Tensor | None,
    slots: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    """Projections of x, head norms and rotation into q, k, v and the head gate.

    With `before`, x is that times a norm's 1 + weight, and its rows are still to be scaled. With `slots`, k and v are
    a cache, and `scales` those of an int8 one.
    """
    q, k, v, gate = out
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[-2]
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, num_heads]
    gate_parts = _side_by_side(x, weights[3:], formats[3:], sizes[3:])
    parts = _side_by_side(x, weights[:3], formats[:3], sizes[:3])
    triton_norm.finish_heads[(num_tokens, cdiv(num_heads + 2 * num_kv_heads, HEAD_BLOCK) + 1)](
        parts, gate_parts, q_weight, k_weight, cos.contiguous(), sin.contiguous(), q, k, v, gate,
        x if before is None else before, x if slots is None else slots, k if scales[0] is None else scales[0],
        v if scales[1] is None else scales[1], num_tokens, x.shape[1], eps, NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=cos.shape[1], BLOCK_D=next_power_of_2(head_dim),
        BLOCK_H=HEAD_BLOCK, BLOCK_G=next_power_of_2(num_heads), BLOCK_X=next_power_of_2(x.shape[1]),
        PARTS=parts.shape[0], GATE_PARTS=gate_parts.shape[0], SCALED=before is not None, CACHED=slots is not None,
        INT8=scales[0] is not None, **OVERLAP,
    )  # fmt: skip


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
    k, v = cuda_norm.heads_together(k), cuda_norm.heads_together(v)
    triton_attention.write_slots[(num_tokens, 2 * num_kv_heads)](
        k, v, k_cache, v_cache, k_cache if k_scale is None else k_scale, v_cache if v_scale is None else v_scale,
        slot_mapping.contiguous(), k.stride(0), v.stride(0), num_kv_heads, head_dim, next_power_of_2(head_dim),
        k_scale is not None, num_warps=1, **OVERLAP,
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
    group_rows = next_power_of_2(num_heads // num_kv_heads)
    block_q = max(1, ATTENTION_ROWS // group_rows)
    num_splits = cdiv(block_table.shape[1] * block_size, CHUNK)
    if window:
        num_splits = min(num_splits, cdiv(window + block_q, CHUNK) + 1)
    split = num_splits > 1 and num_tokens <= block_q * num_seqs
    splits = num_splits if split else 1
    block_d = max(16, next_power_of_2(head_dim))
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
    triton_attention.attend[(cdiv(num_tokens, block_q) + num_seqs, num_kv_heads, splits)](
        q.contiguous(), k_cache, v_cache, k_cache if k_scale is None else k_scale,
        v_cache if v_scale is None else v_scale, gates, block_table, seq_lens, cu_seqlens, out, peaks, totals, sums,
        num_seqs, block_table.stride(0), window, first_key, scale, splits, BLOCK_SIZE=block_size,
        TILE=KEY_TILE // 2 if wide else KEY_TILE, INT8=k_scale is not None, SPLIT=split, WIDE=wide, **sizes,
        **OVERLAP,
    )  # fmt: skip
    if split:
        triton_attention.merge_splits[(num_tokens, num_heads)](
            gates, seq_lens, cu_seqlens, out, peaks, totals, sums, num_seqs, window, first_key, splits, num_warps=1,
            **sizes, **OVERLAP,
        )  # fmt: skip
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


def best_tokens(logits: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    num_rows, block = logits.shape[0], 2048
    chunks = cdiv(limit, block)
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        chunk_values = torch.empty((num_rows, chunks), dtype=torch.float32, device=logits.device)
        chunk_ids = torch.empty((num_rows, chunks), dtype=torch.int32, device=logits.device)
        triton_sampling.best_of_chunk[(num_rows, chunks)](
            logits, chunk_values, chunk_ids, logits.stride(0), limit, chunks, block, **OVERLAP
        )
        triton_sampling.best_of_row[(num_rows,)](
            chunk_values, chunk_ids, values, ids, chunks, next_power_of_2(chunks), **OVERLAP
        )
    return ids, values
