"""One decoder layer: attention, then a dense MLP or routed experts beside a shared one."""

from __future__ import annotations

from torch import Tensor, nn

from stepflash.model.attention import Attend, Attention
from stepflash.model.config import ModelConfig
from stepflash.model.layers import MLP, RMSNorm
from stepflash.model.moe import MoE, Route
from stepflash.model.rope import Rotation


class DecoderLayer(nn.Module):
    """Pre-norm residual layer."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        layer = config.layers[layer_idx]
        self.rope = layer.rope
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe: MoE | None = None
        if layer.is_moe:
            self.moe = MoE(config, layer_idx)
            self.share_expert = MLP(
                config.hidden_size, config.shared_expert_intermediate_size, layer.shared_swiglu_limit
            )
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, layer.shared_swiglu_limit)

    def forward(self, x: Tensor, cos_sin: Rotation, attend: Attend, route: Route | None = None) -> Tensor:
        """x [num_tokens, hidden_size] -> same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, attend)
        normed = self.post_attention_layernorm(x)
        if self.moe is None:
            out: Tensor = x + self.mlp(normed)
        else:
            out = x + self.moe(normed, route) + self.share_expert(normed)
        return out
