"""Loss-free load balancing: a selection bias per expert, nudged after each step (arXiv 2408.15664).

The bias takes part in the choice of experts only, never in their weights, so it costs the loss nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepflash.model.moe import MoE
from stepflash.model.transformer import Step3p5ForCausalLM


class LoadCounter:
    """A `route` that changes nothing and counts the tokens of each expert, layer by layer."""

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}

    def __call__(self, layer_idx: int, scores: Tensor, topk_ids: Tensor) -> Tensor:
        load = torch.bincount(topk_ids.flatten(), minlength=scores.shape[-1])
        self.counts[layer_idx] = self.counts[layer_idx] + load if layer_idx in self.counts else load
        return topk_ids

    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean, worst layer."""
        return max((float(n.max() / n.float().mean()) for n in self.counts.values()), default=1.0)


@torch.no_grad()
def update_router_bias(model: Step3p5ForCausalLM, load: LoadCounter, rate: float) -> None:
    """bias += rate * sign(mean load - load), over the whole batch that `load` saw."""
    for layer in model.trunk_layers():
        if isinstance(layer.moe, MoE) and layer.moe.layer_idx in load.counts:
            count = load.counts[layer.moe.layer_idx].float()
            layer.moe.router_bias.add_(rate * torch.sign(count.mean() - count))
