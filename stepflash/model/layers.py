"""The small parts every layer is made of: norm, linear map, gated MLP.

Parameter names and shapes are those of the released checkpoint, so `state_dict` is the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = x / rms(x) * (1 + weight), computed in fp32 and rounded once at the end.

    The weight is the distance from 1 (zero-centred) and always fp32: adding 1 to it in bf16 would lose it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] of any float dtype; the result has the same."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * (1.0 + self.weight.float())).to(x.dtype)


class Linear(nn.Linear):
    """A bias-free linear map; the loader may swap it for a quantised one of the same interface."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up; with a limit L: min(silu(gate), L) * clamp(up, -L, L) (released modeling code)."""
    activated = F.silu(gate)
    if limit is None:
        return activated * up
    return activated.clamp(max=limit) * up.clamp(-limit, limit)


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x))): the dense MLP and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, hidden_size] -> same shape."""
        hidden: Tensor = self.down_proj(clamped_swiglu(self.gate_proj(x), self.up_proj(x), self.limit))
        return hidden
