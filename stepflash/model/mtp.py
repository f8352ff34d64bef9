"""Multi-token prediction: three more decoder layers, each with its own norms, projection and LM head.

Module k reads the hidden state that module k - 1 left at a position (the trunk for k = 1, before its final norm)
and the embedding of the token k places later, and predicts the token after that one (DeepSeek-V3 report,
section 2.2, chained; Step 3.5 Flash report, section 2.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepflash.model.attention import Attend
from stepflash.model.block import DecoderLayer
from stepflash.model.config import ModelConfig
from stepflash.model.layers import Linear, RMSNorm
from stepflash.model.rope import Rotation


class SharedHead(nn.Module):
    """Final norm and LM head of one module. The name is the checkpoint's; nothing is shared with the trunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.output(self.norm(hidden_states))
        return logits


class MTPLayer(DecoderLayer):
    """One prediction module; a decoder layer whose input joins a token and a hidden state."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.transformer = nn.ModuleDict({"shared_head": SharedHead(config)})

    def combine(self, embeddings: Tensor, hidden_states: Tensor, cos_sin: Rotation, attend: Attend) -> Tensor:
        """Both inputs [num_tokens, hidden_size], the embedding half first -> this module's hidden states."""
        out: Tensor = self(self.join(embeddings, hidden_states), cos_sin, attend)
        return out

    def join(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """What the layer itself reads of the two."""
        joined: Tensor = self.eh_proj(torch.cat((self.enorm(embeddings), self.hnorm(hidden_states)), dim=-1))
        return joined

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, vocab_size], from this module's own head."""
        logits: Tensor = self.transformer["shared_head"](hidden_states)
        return logits
