"""The ops: schema, reference, shape rule and gradient of each, declared once in torch.library.

The reference is every op's default kernel; the native library (build.py) registers CPU kernels under the same
names, which then win. It is compiled and loaded when an op first runs on the CPU, so call sites and imports
never ask what is available; the Triton kernels (cuda.py) likewise when an op first sees a CUDA tensor. Gradients
recompute through the reference (activations are rounded straight-through; packed weights and caches have none).

Legend: x [num_tokens, hidden_size] bf16 or float32; a packed weight is a uint8 tensor of `formats.py`, on a CUDA
device with kernels one of `cuda_layout.py`.
Every kernel gives a token the same bits whatever else is in the call.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stepflash.kernels import build, reference
from stepflash.kernels.formats import Format, packed_bytes
from stepflash.kernels.kv_layout import is_interleaved

log = logging.getLogger(__name__)

_library = torch.library.Library("stepflash", "DEF")  # type: ignore[no-untyped-call]

# No defaults where there is a gradient: the dispatcher would drop them, and backward lose count.
_SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "linear": "(Tensor x, Tensor[] weights, int[] formats, int[] sizes, Tensor? norm_weight, float eps,"
    " Tensor? gate, Tensor? residual, ScalarType? dtype) -> Tensor",
    "route": "(Tensor x, Tensor router_weight, Tensor? router_bias, int top_k, float scaling_factor)"
    " -> (Tensor, Tensor)",
    "moe": "(Tensor x, Tensor? norm_weight, float eps, Tensor? router_weight, Tensor? router_bias, int top_k,"
    " float scaling_factor, Tensor[] experts, int[] expert_formats, int num_experts, int expert_size, float? limit,"
    " Tensor[] shared, int[] shared_formats, int shared_size, float? shared_limit, Tensor? topk_ids,"
    " Tensor? topk_weights, Tensor? residual) -> Tensor",
    "qk_norm_rope": "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, Tensor sin)"
    " -> (Tensor, Tensor)",
    "qkv_gate": "(Tensor x, Tensor norm_weight, Tensor[] weights, int[] formats, int num_heads, int num_kv_heads,"
    " int head_dim, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, Tensor sin)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "cache_write": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
    " Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()",
    "paged_attention": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens,"
    " Tensor cu_seqlens, int window, float scale, int first_key=0, Tensor? gate=None, Tensor? k_scale=None,"
    " Tensor? v_scale=None)"
    " -> Tensor",
    "cached_attention": "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
    " Tensor block_table, Tensor seq_lens, Tensor cu_seqlens, int window, float scale, int first_key=0,"
    " Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> Tensor",
    "best_tokens": "(Tensor logits, int limit) -> (Tensor, Tensor)",
    "quantize": "(Tensor weight, int fmt) -> Tensor",
    "advise_huge_pages": "(Tensor packed) -> ()",
    "stream_read": "(Tensor data) -> int",
}


def _load_kernels(device: str) -> bool:
    """Whether kernels for this type of device are registered now."""
    if device == "cpu":
        return build.load()
    return device == "cuda" and _load_cuda()


@lru_cache(maxsize=1)
def _load_cuda() -> bool:
    try:
        from stepflash.kernels import cuda
    except ImportError as error:  # no Triton
        log.warning("CUDA kernels are off, the slower PyTorch references run instead: %s", error)
        return False
    cuda.register()
    return True


def wants_tiles(device: torch.device) -> bool:
    """Whether the kernels of this device take packed weights as `cuda_layout` has them."""
    return device.type == "cuda" and _load_cuda()


def _default(name: str) -> Callable[..., Any]:
    """The reference; the first call on a tensor of a device loads its kernels and goes round again."""
    plain = getattr(reference, name)
    tried: set[str] = set()

    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        if type(first) is Tensor and first.device.type not in tried:
            tried.add(first.device.type)
            if _load_kernels(first.device.type):
                return getattr(torch.ops.stepflash, name)(*args, **kwargs)
        return plain(*args, **kwargs)

    return run


def _has_kernels(k_cache: Tensor) -> bool:
    """Whether kernels, if any, take a cache of this layout: interleaved on the CPU, plain on CUDA."""
    return is_interleaved(k_cache) or k_cache.is_cuda


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument that can have a gradient."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [x for x in items if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]


def _is_tiled(weight: object) -> bool:
    """Whether this is a packed weight that the references cannot read."""
    return isinstance(weight, Tensor) and weight.dtype == torch.uint8 and wants_tiles(weight.device)


def _add_gradient(name: str) -> None:
    """Backward of any op: run its reference again on detached inputs and differentiate that."""
    plain = getattr(reference, name)

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any = None, output: Any = None
    ) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if any(_is_tiled(weight) for x in ctx.inputs if isinstance(x, (list, tuple)) for weight in x):
            raise NotImplementedError(
                f"{name} has no gradient with packed weights on a CUDA device: load the model with "
                "quantization='plain'"
            )
        inputs = [
            x.detach().requires_grad_() if _tensors(x) and isinstance(x, Tensor) else x for x in ctx.inputs
        ]
        with torch.enable_grad():
            outputs = plain(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if pairs and wanted
            else [None] * len(wanted)
        )
        return tuple(
            next(found) if isinstance(x, Tensor) and x.requires_grad else _no_gradient(x) for x in inputs
        )

    torch.library.register_autograd(f"stepflash::{name}", backward, setup_context=setup_context, lib=_library)


def _no_gradient(value: Any) -> Any:
    return (
        [None] * len(value)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)
        else None
    )


def _fake_linear(
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
    return x.new_empty((x.shape[0], sum(sizes)), dtype=dtype or x.dtype)


def _fake_route(
    x: Tensor, router_weight: Tensor, router_bias: Any, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


def _like_first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.new_empty(x.shape)


def _like_two(x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _fake_qkv_gate(
    x: Tensor,
    norm_weight: Tensor,
    weights: Any,
    formats: Any,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kv_shape = (x.shape[0], num_kv_heads, head_dim)
    q, gate = x.new_empty((x.shape[0], num_heads, head_dim)), x.new_empty((x.shape[0], num_heads))
    return q, x.new_empty(kv_shape), x.new_empty(kv_shape), gate


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "rms_norm": _like_first,
    "add_rms_norm": _like_two,
    "linear": _fake_linear,
    "route": _fake_route,
    "moe": _like_first,
    "qk_norm_rope": _like_two,
    "qkv_gate": _fake_qkv_gate,
    "cache_write": _nothing,
    "cached_attention": _like_first,
    "paged_attention": _like_first,
    "best_tokens": lambda logits, limit: (
        logits.new_empty(logits.shape[0], dtype=torch.int64),
        logits.new_empty(logits.shape[0]),
    ),
    "quantize": lambda weight, fmt: weight.new_empty(
        (*weight.shape[:-2], packed_bytes(Format(fmt), *weight.shape[-2:])), dtype=torch.uint8
    ),
    "advise_huge_pages": _nothing,
    "stream_read": lambda data: 0,
}
_DIFFERENTIABLE = ("rms_norm", "add_rms_norm", "linear", "moe", "qk_norm_rope", "qkv_gate")

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, _default(_name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"stepflash::{_name}", _FAKES[_name], lib=_library)
for _name in _DIFFERENTIABLE:
    _add_gradient(_name)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size] / rms(x) * (1 + weight [size]), computed in float32, rounded once to x's dtype."""
    return torch.ops.stepflash.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to x's dtype before it is normalised."""
    return torch.ops.stepflash.add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]


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
    """Packed linear maps of one input, side by side: [num_tokens, sum(sizes)] in `dtype` (default x's).

    Activations enter as bf16 (bf16, fp8 weights) or as int8 with a scale per group (int8, int4, q*_k weights),
    see `reference.round_activations`; sums are float32.

    Args:
        weights, formats, sizes: packed weights of [size, in_features], their `Format` codes and rows.
        norm_weight: first x = rms_norm(x, norm_weight, eps).
        gate: [num_tokens, num_heads] logits; first x[:, head] *= sigmoid(gate[:, head]), heads side by side.
        residual: added to the result before it is rounded, [num_tokens, sum(sizes)].
    """
    return torch.ops.stepflash.linear(  # type: ignore[no-any-return]
        x, weights, formats, sizes, norm_weight, eps, gate, residual, dtype
    )


def route(
    x: Tensor, router_weight: Tensor, router_bias: Tensor | None, top_k: int, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """Sigmoid router in float32: expert ids int64 and weights float32, both [num_tokens, top_k].

    The best of sigmoid(x @ router_weight.T) + router_bias, the bias for the choice only; weights are the chosen
    probabilities, renormalised, times scaling_factor. router_weight [num_experts, hidden_size] float32.
    """
    return torch.ops.stepflash.route(x, router_weight, router_bias, top_k, scaling_factor)  # type: ignore[no-any-return]


def moe(
    x: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    top_k: int = 0,
    scaling_factor: float = 1.0,
    experts: Sequence[Tensor] = (),
    expert_formats: Sequence[int] = (),
    num_experts: int = 0,
    expert_size: int = 0,
    limit: float | None = None,
    shared: Sequence[Tensor] = (),
    shared_formats: Sequence[int] = (),
    shared_size: int = 0,
    shared_limit: float | None = None,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A feed-forward block: sum of the chosen experts, plus the shared expert, plus the residual; like x.

    With `shared` alone it is a dense SwiGLU MLP. An expert is down(min(silu(gate), L) * clamp(up, -L, L)), the
    clamps only with a limit L. x is normalised first when norm_weight is given (and feeds the router so).

    Args:
        router_weight, router_bias, top_k, scaling_factor: see `route`; or replayed topk_ids and topk_weights.
        experts: packed gate, up [num_experts, bytes of (expert_size, hidden_size)] and down [num_experts, bytes
            of (hidden_size, expert_size)]; gate and up in one format.
        shared: packed gate, up, down of the shared expert with shared_size hidden units.
    """
    return torch.ops.stepflash.moe(  # type: ignore[no-any-return]
        x, norm_weight, eps, router_weight, router_bias, top_k, scaling_factor, experts, expert_formats,
        num_experts, expert_size, limit, shared, shared_formats, shared_size, shared_limit, topk_ids,
        topk_weights, residual,
    )  # fmt: skip


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Per-head rms_norm, then rotation of the first 2 * cos.shape[1] dimensions, in float32, rounded once.

    Args:
        q, k: [num_tokens, num_heads, head_dim], [num_tokens, num_kv_heads, head_dim]; views into a fused
            projection are fine as long as the heads of a token lie side by side.
        cos, sin: [num_tokens, rotary_dim / 2] float32 of each token's position.
    """
    return torch.ops.stepflash.qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin)  # type: ignore[no-any-return]


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
    """All of an attention layer before attention: `linear` with norm, then `qk_norm_rope`; q, k, v and gate logits.

    Args:
        weights, formats: packed q, k, v and gate projections of the normed x [num_tokens, hidden_size].
    Returns:
        q [num_tokens, num_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim]; gate [num_tokens, num_heads].
    """
    return torch.ops.stepflash.qkv_gate(  # type: ignore[no-any-return]
        x, norm_weight, weights, formats, num_heads, num_kv_heads, head_dim, q_weight, k_weight, eps, cos, sin
    )


def cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Stores k, v [num_tokens, num_kv_heads, head_dim] at slots block * block_size + offset (int64; < 0: skip).

    Caches as in `paged_attention`. An int8 cache gets one scale per token and head, peak / 127.
    """
    if _has_kernels(k_cache):
        torch.ops.stepflash.cache_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    else:
        reference.cache_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


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
    """Causal grouped-query attention over a paged cache, like q: decode, chunks, prefill and verification alike.

    The last cu_seqlens[s + 1] - cu_seqlens[s] positions of sequence s are its queries; their keys and values
    must already be in the cache. The native kernel multiplies in bf16 with float32 sums; an int8 cache exactly,
    with queries and probabilities rounded to 16 bits.

    Args:
        q: [num_tokens, num_heads, head_dim], queries of all sequences end to end.
        k_cache, v_cache, k_scale, v_scale: what `kv_layout.new_kv_cache` makes, the scales of int8 only. Position
            p of sequence s is in block block_table[s, p // block_size] at offset p % block_size.
        block_table: [num_seqs, max_blocks] int32. A sliding layer uses a table of its own, whose entries below
            the oldest visible key may be anything: they are not read.
        seq_lens: [num_seqs] int32, positions in the cache including the queries.
        cu_seqlens: [num_seqs + 1] int32, from 0 to num_tokens.
        window: keys p - window + 1 .. p are visible to position p; 0: all up to p.
        first_key: keys before it hold nothing and are never visible.
        gate: [num_tokens, num_heads] logits; the result is multiplied by sigmoid(gate).
    """
    args = (
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        cu_seqlens,
        window,
        scale,
        first_key,
        gate,
        k_scale,
        v_scale,
    )
    if _has_kernels(k_cache):
        return torch.ops.stepflash.paged_attention(*args)  # type: ignore[no-any-return]
    return reference.paged_attention(*args)


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
    """`cache_write` of k, v, then `paged_attention` of q, in one call; arguments as there."""
    args = (
        q, k, v, k_cache, v_cache, slot_mapping, block_table, seq_lens, cu_seqlens, window, scale, first_key,
        k_scale, v_scale,
    )  # fmt: skip
    if _has_kernels(k_cache):
        return torch.ops.stepflash.cached_attention(*args)  # type: ignore[no-any-return]
    return reference.cached_attention(*args)


def best_tokens(logits: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Of each row [num_rows, vocab_size] the best token below `limit`, the lowest id of equals, and its logit.

    A row with NaN gives NaN or infinity as the logit.
    """
    return torch.ops.stepflash.best_tokens(logits, limit)  # type: ignore[no-any-return]


def quantize(weight: Tensor, fmt: Format) -> Tensor:
    """[n, k] or [num_experts, n, k] of floats -> packed [num_bytes] or [num_experts, num_bytes].

    Kernels are there for int8 and int4, where torch takes minutes for a large model; other formats are
    rearrangements.

    Raises:
        ValueError: the format has no quantiser here (Q4_K and Q6_K come from GGUF files), or a weight is NaN,
            infinite or too large for a float16 scale.
    """
    if fmt.is_int8 or fmt.is_int4:
        return torch.ops.stepflash.quantize(weight, int(fmt))  # type: ignore[no-any-return]
    return reference.quantize(weight, fmt)


def advise_huge_pages(packed: Tensor) -> Tensor:
    """Asks for huge pages behind a large, not yet written tensor, which then streams faster; returns it."""
    torch.ops.stepflash.advise_huge_pages(packed)
    return packed


def stream_read(data: Tensor) -> int:
    """Reads every byte of a contiguous tensor once with all threads; the number only proves it."""
    return int(torch.ops.stepflash.stream_read(data))


def measure_bandwidth(num_bytes: int = 512 << 20, repeats: int = 5, device: str = "cpu") -> float:
    """Bytes per second that all threads, or a GPU, read from memory: median over `repeats` passes.

    The buffer must be far larger than the last-level cache, and a multiple of four bytes.
    """
    buffer = advise_huge_pages(torch.empty(num_bytes, dtype=torch.uint8, device=device)).fill_(1)

    def read_all() -> None:
        if device == "cpu":
            stream_read(buffer)
        else:
            buffer.view(torch.float32).sum().item()  # waits for the result

    read_all()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        read_all()
        seconds.append(time.perf_counter() - start)
    return num_bytes / statistics.median(seconds)
