"""How a layer's keys and values lie in memory: `interleaved` for the native CPU kernels, `plain` for all else.

plain: keys and values [num_blocks, block_size, num_kv_heads, head_dim], scales [num_blocks, block_size,
num_kv_heads]. A token's head is one row, as GPU kernels and the reference like it.

interleaved: keys [num_blocks, num_kv_heads, head_dim / 2, block_size, 2], values [num_blocks, num_kv_heads,
block_size / 2, head_dim, 2], scales [num_blocks, num_kv_heads, block_size]. A vector of a dot product lies as it
is multiplied: scores of neighbouring keys from pairs of dimensions, sums of dimensions from pairs of keys. A head
of a block is contiguous, so a decode step streams.

The number of dimensions tells which one a tensor has. Scales are those of int8 caches, float32.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import torch
from torch import Tensor


def is_interleaved(cache: Tensor) -> bool:
    """Whether a cache of keys or values is one that the native CPU kernels take."""
    return cache.dim() == 5


def new_kv_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Zeros: keys, values and, for int8, their scales; interleaved where the native CPU kernels support the sizes.

    Zeroed pages are mapped on first touch, so a large cache costs no memory until it is used.
    """
    native = (
        torch.device(device).type == "cpu"
        and dtype in (torch.bfloat16, torch.int8)
        and head_dim % 32 == 0
        and head_dim <= 256
        and block_size % 2 == 0
    )
    if native:
        key_shape = (num_blocks, num_kv_heads, head_dim // 2, block_size, 2)
        value_shape = (num_blocks, num_kv_heads, block_size // 2, head_dim, 2)
        scale_shape = (num_blocks, num_kv_heads, block_size)
    else:
        key_shape = value_shape = (num_blocks, block_size, num_kv_heads, head_dim)  # type: ignore[assignment]
        scale_shape = (num_blocks, block_size, num_kv_heads)
    keys = _zeros(key_shape, dtype, device)
    values = _zeros(value_shape, dtype, device)
    if dtype != torch.int8:
        return keys, values, None, None
    scales = [_zeros(scale_shape, torch.float32, device) for _ in range(2)]
    return keys, values, scales[0], scales[1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not num_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    # `torch.zeros` writes every page; those that come from the system are zero as they are. Private ones may be huge,
    # which spares a long context TLB misses.
    if sys.platform != "linux":
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def block_size_of(k_cache: Tensor) -> int:
    return k_cache.shape[3 if is_interleaved(k_cache) else 1]


def read_slots(cache: Tensor, scale: Tensor | None, slots: Tensor, *, is_value: bool) -> Tensor:
    """What lies in slots [n] of one tensor of a cache, as float32 [n, num_kv_heads, head_dim]."""
    rows = _rows(cache, slots, is_value=is_value).float()
    if scale is None:
        return rows
    return rows * _scales(scale, slots, is_interleaved(cache)).unsqueeze(-1)


def write_slots(
    cache: Tensor, scale: Tensor | None, slots: Tensor, values: Tensor, *, is_value: bool
) -> None:
    """Store values [n, num_kv_heads, head_dim] in slots [n]; int8 with a scale per token and head, peak / 127."""
    if cache.dtype == torch.int8:
        assert scale is not None
        peak = values.float().abs().amax(-1)
        inverse = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, 0.0)
        values = (values.float() * inverse.unsqueeze(-1)).round()
        if is_interleaved(cache):
            scale[slots // scale.shape[2], :, slots % scale.shape[2]] = peak / 127.0
        else:
            scale.flatten(0, 1)[slots] = peak / 127.0
    values = values.to(cache.dtype)
    if not is_interleaved(cache):
        cache.flatten(0, 1)[slots] = values
    elif is_value:
        size = 2 * cache.shape[2]
        cache[slots // size, :, slots % size // 2, :, slots % 2] = values
    else:
        size = cache.shape[3]
        cache[slots // size, :, :, slots % size] = values.reshape(*values.shape[:-1], -1, 2)


def _rows(cache: Tensor, slots: Tensor, *, is_value: bool) -> Tensor:
    if not is_interleaved(cache):
        return cache.flatten(0, 1)[slots]
    if is_value:
        size = 2 * cache.shape[2]
        return cache[slots // size, :, slots % size // 2, :, slots % 2]
    size = cache.shape[3]
    return cache[slots // size, :, :, slots % size].flatten(-2)


def _scales(scale: Tensor, slots: Tensor, interleaved: bool) -> Tensor:
    if not interleaved:
        return scale.flatten(0, 1)[slots]
    return scale[slots // scale.shape[2], :, slots % scale.shape[2]]
