"""Attention: projections, head norms and head gate here; where keys and values live is an argument.

`Attention` hands rotated queries, keys and values to `attend(layer_idx, q, k, v)`. `PackedAttention` is that
function for whole documents laid end to end (training, scoring); the engine brings its own over a paged cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepflash.model.config import LayerConfig, ModelConfig
from stepflash.model.layers import Linear, RMSNorm
from stepflash.model.rope import Rotation, rotate

# (layer_idx, q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim]) -> like q
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query attention with per-head RMSNorm of q and k, rotary embedding and a sigmoid gate per head."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        layer = config.layers[layer_idx]
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads, self.head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, self.num_heads * self.head_dim)
        self.k_proj = Linear(hidden, self.num_kv_heads * self.head_dim)
        self.v_proj = Linear(hidden, self.num_kv_heads * self.head_dim)
        self.g_proj = Linear(hidden, self.num_heads)
        self.o_proj = Linear(self.num_heads * self.head_dim, hidden)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos_sin: Rotation, attend: Attend) -> Tensor:
        """x: the normed layer input [num_tokens, hidden_size] -> same shape."""
        q = self.q_proj(x).view(-1, self.num_heads, self.head_dim)  # [num_tokens, num_heads, head_dim]
        k = self.k_proj(x).view(-1, self.num_kv_heads, self.head_dim)  # [num_tokens, num_kv_heads, head_dim]
        v = self.v_proj(x).view(-1, self.num_kv_heads, self.head_dim)
        q, k = rotate(self.q_norm(q), cos_sin), rotate(self.k_norm(k), cos_sin)
        attn_output = attend(self.layer_idx, q, k, v)
        gate = torch.sigmoid(self.g_proj(x)).unsqueeze(-1)  # [num_tokens, num_heads, 1]
        hidden: Tensor = self.o_proj((attn_output * gate).flatten(1))
        return hidden


class PackedAttention:
    """Causal attention inside each of several documents packed end to end; no cache.

    Full layers run document by document; sliding layers run over the whole pack in blocks of one window, each
    seeing itself and the block before, which costs O(num_tokens * window) whatever the lengths.
    """

    def __init__(
        self, layers: Sequence[LayerConfig], cu_seqlens: Sequence[int], device: torch.device | str
    ) -> None:
        """cu_seqlens: document boundaries in tokens, from 0 to num_tokens."""
        self.layers = layers
        self.cu_seqlens = tuple(int(n) for n in cu_seqlens)
        lengths = torch.tensor(self.cu_seqlens, device=device).diff()
        self.document_idx = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        self._masks: dict[int, Tensor] = {}

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.layers[layer_idx].window
        longest = max(end - start for start, end in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False))
        if window is None or window >= longest:
            return self._full(q, k, v)
        return self._sliding(q, k, v, window)

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        outputs = []
        for start, end in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False):
            # [1, heads, length, head_dim]; KV head j serves query heads j * group .. j * group + group - 1.
            parts = [t[start:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
            keys, values = (t.repeat_interleave(group, dim=1) for t in parts[1:])
            attended = F.scaled_dot_product_attention(parts[0], keys, values, is_causal=True)
            outputs.append(attended.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def _sliding(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        group = num_heads // num_kv_heads
        padding = -num_tokens % window
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (q, k, v))
        blocks = q.shape[0] // window
        q = q.view(blocks, window, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(blocks, num_kv_heads, group * window, head_dim)
        keys, values = (_with_block_before(t.view(blocks, window, num_kv_heads, head_dim)) for t in (k, v))
        scores = (
            q @ keys.transpose(-1, -2)
        ).float() * head_dim**-0.5  # [blocks, kv_heads, group * window, 2 window]
        scores = scores.view(blocks, num_kv_heads, group, window, 2 * window)
        scores = scores.masked_fill(self._mask(window)[:, None, None], float("-inf"))
        weights = scores.softmax(-1).to(v.dtype).view(blocks, num_kv_heads, group * window, 2 * window)
        attended: Tensor = (weights @ values).view(blocks, num_kv_heads, group, window, head_dim)
        return attended.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)[:num_tokens]

    def _mask(self, window: int) -> Tensor:
        """True where a query must not look: [blocks, window, 2 * window]."""
        if window not in self._masks:
            documents = self.document_idx
            padded = F.pad(documents, (0, -documents.shape[0] % window), value=-1)
            rows = padded.view(-1, window)
            keys = torch.cat((F.pad(rows[:-1], (0, 0, 1, 0), value=-2), rows), dim=1)
            place = torch.arange(2 * window, device=documents.device)
            distance = place[window:, None] - place[None, :]  # query minus key
            hidden = (distance < 0) | (distance >= window)
            self._masks[window] = hidden | (rows[:, :, None] != keys[:, None, :])
        return self._masks[window]


def _with_block_before(x: Tensor) -> Tensor:
    """[blocks, window, heads, dim] -> [blocks, heads, 2 * window, dim]: each block after its predecessor."""
    before = F.pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((before, x), dim=1).transpose(1, 2)
