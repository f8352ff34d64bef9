"""A decoder layer on CUDA devices in few launches: what the engine runs instead of the separate ops.

A norm is taken apart. Whatever adds to the hidden states x also leaves x times 1 + weight of the norm that follows,
as bf16, for that norm's products to read; the scale of a row is found from x by those who add the products up, and
multiplies their float32 sums. So x is rounded once on its way, as by a norm, and no launch is needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from stepflash.kernels import cuda, cuda_matmul, triton_finish
from stepflash.kernels.cuda_moe import feed_forward
from stepflash.kernels.formats import Format
from stepflash.kernels.triton_start import OVERLAP

__all__ = ["Cached", "attention", "feed_forward", "times_gain"]


@dataclass(frozen=True, slots=True)
class Cached:
    """A layer's cache and the tokens of a pass in it; as the arguments of `ops.cached_attention`."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens: Tensor
    window: int
    scale: float
    first_key: int
    k_scale: Tensor | None
    v_scale: Tensor | None


def times_gain(x: Tensor, gain: Tensor) -> Tensor:
    """x times 1 + gain as bf16: what a norm's products read."""
    num_tokens, size = x.shape
    out, block = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device), min(1024, next_power_of_2(size))
    triton_finish.times_gain[(num_tokens, cdiv(size, block))](x, gain, out, size, block, **OVERLAP)
    return out


def attention(
    x: Tensor,
    scaled: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[int],
    num_heads: int,
    head_dim: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cached: Cached,
    output: Tensor,
    output_format: int,
    gain: Tensor,
) -> tuple[Tensor, Tensor]:
    """x plus attention of its norm, and that times the next norm's 1 + `gain`."""
    num_tokens, hidden_size = x.shape
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=x.dtype, device=x.device)
    gate = torch.empty((num_tokens, num_heads), dtype=x.dtype, device=x.device)
    cuda.project_heads(
        scaled, weights, formats, q_weight, k_weight, eps, cos, sin, (q, cached.keys, cached.values, gate), x,
        cached.slots, (cached.k_scale, cached.v_scale),
    )  # fmt: skip
    attended = cuda.paged_attention(
        q, cached.keys, cached.values, cached.block_table, cached.seq_lens, cached.cu_seqlens, cached.window,
        cached.scale, cached.first_key, gate, cached.k_scale, cached.v_scale,
    )  # fmt: skip
    out, after = torch.empty_like(x), torch.empty_like(scaled)
    size, fmt = num_heads * head_dim, Format(output_format)
    cuda_matmul.matmul(
        attended.view(num_tokens, size), [(output, fmt, hidden_size)],
        cuda_matmul.num_finished_splits(hidden_size, size, fmt), cuda_matmul.Finish(x, out, gain, after),
    )  # fmt: skip
    return out, after
