"""The engine's `attend`: write this layer's keys and values into the cache, then attend over the cache.

One object serves one run of the network. The reference below gathers each sequence's visible blocks and calls
scaled_dot_product_attention; it is what a native kernel of the same signature is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stepflash.engine.batch import TokenBatch
from stepflash.engine.kv_cache import KVCache
from stepflash.model.config import ModelConfig


class PagedAttention:
    """`attend(layer_idx, q, k, v)` over a paged cache for the tokens of one batch."""

    def __init__(self, config: ModelConfig, cache: KVCache, batch: TokenBatch) -> None:
        self._layers = config.layers
        self._cache = cache
        self._batch = batch

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, batch = self._cache, self._batch
        group = cache.group_of[layer_idx]
        cache.write(layer_idx, batch.slot_mapping[group], k, v)
        return paged_attention(
            q,
            cache.keys[layer_idx],
            cache.values[layer_idx],
            batch.block_tables[group],
            batch.cu_seqlens,
            batch.context_lens,
            self._layers[layer_idx].window,
            cache.first_slot[layer_idx],
        )


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    cu_seqlens: list[int],
    context_lens: list[int],
    window: int | None,
    first_slot: int,
) -> Tensor:
    """Causal attention of the last tokens of each sequence over its slots.

    Args:
        q: [num_tokens, num_heads, head_dim]; sequence i owns rows cu_seqlens[i] .. cu_seqlens[i + 1], which
            stand in its last slots.
        keys, values: [num_blocks, block_size, num_kv_heads, head_dim].
        block_tables: [num_seqs, max_blocks] int32, block of slots j * block_size and up.
        context_lens: slots of each sequence, q's own included.
        window: slots s - window + 1 .. s are visible from s; None is all of them.
        first_slot: slots before it hold nothing and are never visible.
    Returns:
        [num_tokens, num_heads, head_dim] in q's dtype.
    """
    block_size = keys.shape[1]
    output = torch.empty_like(q)
    for i, end in enumerate(context_lens):
        row, stop = cu_seqlens[i], cu_seqlens[i + 1]
        start = end - (stop - row)  # slot of the first query
        begin = first_slot if window is None else max(first_slot, start - window + 1)
        first_block = begin // block_size
        used = block_tables[i, first_block : -(-end // block_size)]
        offset = begin - first_block * block_size
        k, v = (
            cached[used].flatten(0, 1)[offset : offset + end - begin].transpose(0, 1).unsqueeze(0).to(q.dtype)
            for cached in (keys, values)
        )  # [1, num_kv_heads, end - begin, head_dim]
        mask = None
        if stop - row > 1:
            queries = torch.arange(start, end, device=q.device)[:, None]
            slots = torch.arange(begin, end, device=q.device)[None, :]
            mask = slots <= queries
            if window is not None:
                mask &= slots > queries - window
        attended = F.scaled_dot_product_attention(
            q[row:stop].transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask, enable_gqa=True
        )
        output[row:stop] = attended.squeeze(0).transpose(0, 1)
    return output
