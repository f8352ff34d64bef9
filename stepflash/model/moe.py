"""The mixture of experts: fp32 sigmoid router with a selection bias, stacked experts.

Routing can be watched or replaced through one optional function, which is how training counts the load and
RL replays recorded routes. The shared expert is not here: it is a sibling in the layer, never scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepflash.model.config import ModelConfig
from stepflash.model.layers import clamped_swiglu

# (layer_idx, scores [num_tokens, num_experts] fp32, topk_ids [num_tokens, top_k]) -> the ids to use
Route = Callable[[int, Tensor, Tensor], Tensor]


class StackedExperts(nn.Module):
    """One projection of all experts: weight [num_experts, out_features, in_features]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def per_expert(self) -> Sequence[Tensor]:
        # unbind's gradient is one stack; indexing would make a full-size gradient for every expert.
        return self.weight.unbind(0) if torch.is_grad_enabled() else self.weight  # type: ignore[return-value]


class Router(nn.Module):
    """The gate matrix, fp32 whatever the rest of the model is."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, hidden_size] -> scores in (0, 1) [num_tokens, num_experts] fp32."""
        return torch.sigmoid(F.linear(x.float(), self.weight.float()))


class MoE(nn.Module):
    """The routed experts of one layer."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.top_k = config.num_experts_per_tok
        self.scaling_factor = config.router_scaling_factor
        self.limit = config.layers[layer_idx].swiglu_limit
        hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate = Router(hidden, experts)
        self.router_bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32))
        self.gate_proj = StackedExperts(experts, hidden, width)
        self.up_proj = StackedExperts(experts, hidden, width)
        self.down_proj = StackedExperts(experts, width, hidden)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """x [num_tokens, hidden_size] -> sum of the chosen experts' outputs, same shape and dtype."""
        topk_ids, topk_weights = self.choose(x, route)
        return run_experts(
            x,
            topk_ids,
            topk_weights,
            self.gate_proj.per_expert(),
            self.up_proj.per_expert(),
            self.down_proj.per_expert(),
            self.limit,
        )

    def choose(self, x: Tensor, route: Route | None = None) -> tuple[Tensor, Tensor]:
        """Expert ids [num_tokens, top_k] and their weights, fp32, same shape.

        The bias takes part in the choice only; weights are the chosen scores, renormalised, times the factor.
        """
        scores = self.gate(x)  # [num_tokens, num_experts]
        topk_ids = torch.topk(scores.detach() + self.router_bias.float(), self.top_k, dim=-1).indices
        if route is not None:
            topk_ids = route(self.layer_idx, scores, topk_ids)
        chosen = scores.gather(-1, topk_ids)
        return topk_ids, chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * self.scaling_factor


def run_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    limit: float | None,
) -> Tensor:
    """Weighted sum of expert outputs, accumulated in fp32.

    Tokens are sorted by expert, so that each expert runs once on a contiguous block.

    Args:
        x: [num_tokens, hidden_size]
        topk_ids, topk_weights: [num_tokens, top_k]
        gate, up, down: per expert, [width, hidden_size] twice and [hidden_size, width].
    """
    num_tokens, top_k = topk_ids.shape
    order = topk_ids.flatten().argsort(stable=True)  # [num_tokens * top_k], expert by expert
    token_idx = order // top_k
    counts = torch.bincount(topk_ids.flatten(), minlength=len(gate)).tolist()
    outputs = []
    for expert, block in enumerate(torch.split(x[token_idx], counts)):
        if block.shape[0]:
            hidden = clamped_swiglu(F.linear(block, gate[expert]), F.linear(block, up[expert]), limit)
            outputs.append(F.linear(hidden, down[expert]))
    if not outputs:
        return torch.zeros_like(x)
    weighted = torch.cat(outputs).float() * topk_weights.flatten()[order, None]
    total = torch.zeros(num_tokens, x.shape[1], dtype=torch.float32, device=x.device)
    return total.index_add(0, token_idx, weighted).to(x.dtype)
