"""The engine's `attend`: write this layer's keys and values into the cache, then attend over the cache.

One object serves one run of the network. Which kernel runs is the dispatcher's business; the ops' reference is
exact in float32 (see `stepflash.kernels.ops`).
"""

from __future__ import annotations

from torch import Tensor

from stepflash.engine.batch import TokenBatch
from stepflash.engine.kv_cache import KVCache
from stepflash.kernels import ops
from stepflash.model.config import ModelConfig


class PagedAttention:
    """`attend(layer_idx, q, k, v)` over a paged cache for the tokens of one batch."""

    def __init__(self, config: ModelConfig, cache: KVCache, batch: TokenBatch) -> None:
        self._layers = config.layers
        self._cache = cache
        self._batch = batch

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] -> like q."""
        cache, batch, layer = self._cache, self._batch, self._layers[layer_idx]
        group = cache.group_of[layer_idx]
        keys, values = cache.keys[layer_idx], cache.values[layer_idx]
        k_scale, v_scale = cache.scales.get(layer_idx, (None, None))
        ops.cache_write(k, v, keys, values, batch.slot_mapping[group], k_scale, v_scale)
        return ops.paged_attention(
            q,
            keys,
            values,
            batch.block_tables[group],
            batch.context_lens,
            batch.cu_seqlens,
            layer.window or 0,
            layer.head_dim**-0.5,
            cache.first_slot[layer_idx],
            None,
            k_scale,
            v_scale,
        )
