"""The engine's `attend`: write this layer's keys and values into the cache, then attend over the cache.

One object serves one run of the network. Which kernel runs is the dispatcher's business; the ops' reference is
exact in float32 (see `stepflash.kernels.ops`).
"""

from __future__ import annotations

from torch import Tensor

from stepflash.engine.batch import TokenBatch
from stepflash.engine.kv_cache import KVCache
from stepflash.kernels import ops


class PagedAttention:
    """`attend(layer_idx, q, k, v)` over a paged cache for the tokens of one batch."""

    def __init__(self, cache: KVCache, batch: TokenBatch) -> None:
        self._layers = cache.layers
        self._batch = batch

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] -> like q."""
        layer, batch = self._layers[layer_idx], self._batch
        return ops.cached_attention(
            q,
            k,
            v,
            layer.keys,
            layer.values,
            batch.slot_mapping(layer.group),
            batch.block_tables[layer.group],
            batch.context_lens,
            batch.cu_seqlens,
            layer.window or 0,
            layer.scale,
            layer.first_slot,
            layer.k_scale,
            layer.v_scale,
        )
