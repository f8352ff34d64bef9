"""What every op computes, in plain PyTorch: the definition that the native kernels are tested against.

Clarity first: weights are unpacked whole, attention is dense per sequence. These run where there is no native
kernel (other devices, no compiler), and gradients are taken through them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stepflash.kernels import formats, kv_layout
from stepflash.kernels.formats import Format, unpack


def round_activations(x: Tensor, fmt: Format) -> Tensor:
    """x [num_tokens, k] as the kernels of a format see it, float32: bf16, or int8 with a scale per group of k.

    int8: scale = peak / 127 over each group of `fmt.group`; relative error about 0.4 % of the group's peak at
    most. The rounding is straight-through for gradients.
    """
    if fmt.group == 0:
        return x.to(torch.bfloat16).float()
    k = x.shape[-1]
    wide = F.pad(x.float(), (0, -k % fmt.group)).view(*x.shape[:-1], -1, fmt.group)
    peak = wide.detach().abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, 0.0)
    rounded = (wide.detach() * inverse).round() * (peak / 127.0)
    result: Tensor = (wide + (rounded - wide.detach())).flatten(-2)[..., :k]
    return result


def _matmul(x: Tensor, packed: Tensor, fmt: Format, n: int) -> Tensor:
    return round_activations(x, fmt) @ unpack(packed, fmt, n, x.shape[-1]).T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight) in float32, rounded once."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (1.0 + weight.float())).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[int],
    sizes: Sequence[int],
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    if gate is not None:
        heads = x.float().view(x.shape[0], gate.shape[1], -1) * torch.sigmoid(gate.float()).unsqueeze(-1)
        x = heads.flatten(-2).to(x.dtype)
    parts = [_matmul(x, w, Format(f), n) for w, f, n in zip(weights, formats, sizes, strict=True)]
    out = torch.cat(parts, -1)
    if residual is not None:
        out = out + residual.float()
    return out.to(dtype or x.dtype)


def route(
    x: Tensor, router_weight: Tensor, router_bias: Tensor | None, top_k: int, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    probability = torch.sigmoid(x.float() @ router_weight.float().T)  # [num_tokens, num_experts]
    ranked = probability.detach() if router_bias is None else probability.detach() + router_bias
    # A stable sort, so that ties go to the lowest index as in the native kernel.
    topk_ids = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen = probability.gather(1, topk_ids)
    return topk_ids, chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scaling_factor


def _swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    activated = F.silu(gate)
    if limit is None:
        return activated * up
    return activated.clamp(max=limit) * up.clamp(-limit, limit)


def _expert(
    x: Tensor, weights: Sequence[Tensor], formats: Sequence[int], size: int, limit: float | None
) -> Tensor:
    gate, up, down = weights
    hidden = _swiglu(
        _matmul(x, gate, Format(formats[0]), size), _matmul(x, up, Format(formats[1]), size), limit
    )
    return _matmul(hidden, down, Format(formats[2]), x.shape[-1])


def moe(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    top_k: int,
    scaling_factor: float,
    experts: Sequence[Tensor],
    expert_formats: Sequence[int],
    num_experts: int,
    expert_size: int,
    limit: float | None,
    shared: Sequence[Tensor],
    shared_formats: Sequence[int],
    shared_size: int,
    shared_limit: float | None,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    normed = x if norm_weight is None else rms_norm(x, norm_weight, eps)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if experts:
        if topk_ids is None or topk_weights is None:
            assert router_weight is not None
            topk_ids, topk_weights = route(normed, router_weight, router_bias, top_k, scaling_factor)
        for expert in torch.unique(topk_ids).tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            packed = [weight[expert] for weight in experts]
            out = _expert(normed[token], packed, expert_formats, expert_size, limit)
            total = total.index_add(0, token, out * topk_weights[token, slot, None])
    if shared:
        total = total + _expert(normed, shared, shared_formats, shared_size, shared_limit)
    if residual is not None:
        total = total + residual.float()
    return total.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [num_tokens, num_heads, head_dim]; pairs (j, j + half) of the first 2 * half dimensions turn."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q_out = rotate(rms_norm(q.float(), q_weight, eps), cos, sin).to(q.dtype)
    k_out = rotate(rms_norm(k.float(), k_weight, eps), cos, sin).to(k.dtype)
    return q_out, k_out


def qkv_gate(
    x: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, num_heads]
    q, k, v, gate = torch.split(linear(x, weights, formats, sizes, norm_weight, eps), sizes, -1)
    shape = (x.shape[0], -1, head_dim)
    q, k = qk_norm_rope(q.reshape(shape), k.reshape(shape), q_weight, k_weight, eps, cos, sin)
    return q, k, v.reshape(shape).contiguous(), gate.contiguous()


def cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    kv_layout.write_slots(k_cache, k_scale, slots, k[kept].detach(), is_value=False)
    kv_layout.write_slots(v_cache, v_scale, slots, v[kept].detach(), is_value=True)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    window: int,
    scale: float,
    first_key: int = 0,
    gate: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    block_size = kv_layout.block_size_of(k_cache)
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for seq, length in enumerate(seq_lens.tolist()):
        begin, end = bounds[seq], bounds[seq + 1]
        if begin == end:
            continue
        positions = torch.arange(length - (end - begin), length, device=q.device)
        first = max(first_key, int(positions[0]) - window + 1) if window else first_key
        keys = torch.arange(min(first, length), length, device=q.device)
        slots = block_table[seq].long()[keys // block_size] * block_size + keys % block_size
        k = kv_layout.read_slots(k_cache, k_scale, slots, is_value=False)
        v = kv_layout.read_slots(v_cache, v_scale, slots, is_value=True)
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))  # [num_keys, num_heads, head_dim]
        queries = q[begin:end].float()
        scores = torch.einsum("qhd,khd->hqk", queries, k) * scale
        hidden = keys[None] > positions[:, None]
        if window:
            hidden |= keys[None] <= positions[:, None] - window
        # A query before first_key sees nothing: zeros, not NaN.
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
        attended = torch.einsum("hqk,khd->qhd", weights, v)
        if gate is not None:
            attended = attended * torch.sigmoid(gate[begin:end].float()).unsqueeze(-1)
        out[begin:end] = attended.to(q.dtype)
    return out


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    window: int,
    scale: float,
    first_key: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    cache_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        cu_seqlens,
        window,
        scale,
        first_key,
        None,
        k_scale,
        v_scale,
    )


def best_tokens(logits: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    best = logits[:, :limit].max(dim=-1)  # the lowest id of equals, and NaN wins
    return best.indices, best.values


def quantize(weight: Tensor, fmt: int) -> Tensor:
    return formats.quantize(weight, Format(fmt))


def advise_huge_pages(packed: Tensor) -> None:
    """Nothing to do without native memory."""


def stream_read(data: Tensor) -> int:
    """Touches every byte once."""
    return int(data.flatten().view(torch.uint8).sum())
