"""Norms and rotation on CUDA devices: the launches of `triton_norm.py`. Signatures are those of `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import next_power_of_2

from stepflash.kernels import triton_norm
from stepflash.kernels.triton_start import OVERLAP


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
            x, added, weight, out, total, size, eps, next_power_of_2(size), residual is not None,
            num_warps=8 if size > 2048 else 4, **OVERLAP,
        )  # fmt: skip
    return out, total


def row_scales(x: Tensor, eps: float) -> Tensor:
    """What a norm multiplies each row with, beside its weight: [num_rows] float32."""
    num_rows, size = x.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    triton_norm.row_scales[(num_rows,)](x, out, size, eps, next_power_of_2(size), **OVERLAP)
    return out


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _norm_rope(q, q_weight, eps, cos, sin), _norm_rope(k, k_weight, eps, cos, sin)


def _norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    x = heads_together(x)
    num_tokens, num_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        triton_norm.norm_rope[(num_tokens, num_heads)](
            x, weight, out, cos.contiguous(), sin.contiguous(), x.stride(0), eps, num_heads, head_dim,
            cos.shape[1], next_power_of_2(head_dim), **OVERLAP,
        )  # fmt: skip
    return out


def heads_together(x: Tensor) -> Tensor:
    """x [num_tokens, num_heads, head_dim] with a token's heads side by side; views into projections are."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
