"""Speed of the native CPU kernels against what this machine can do, measured in the same run.

    python benchmarks/kernels.py [--threads N] [--formats int4_g32,bf16] [--shapes mini|full|all] [--json]

Decode (1 to 16 tokens): bytes of packed weights per second and the fraction of the read bandwidth, over enough
copies of the weight that none is in a cache. Prefill (512 tokens): multiply-adds, beside torch's bf16 matmul.
Attention: bytes of keys and values per second, for one query and for the four of a verified draft.
Every figure is the median of --repeats passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from stepflash.kernels import build, ops
from stepflash.kernels.formats import Format, packed_bytes, quantize
from stepflash.kernels.kv_layout import new_kv_cache

# (label, rows, columns) of the projections that carry the weights
SHAPES = {
    "mini": [("qkv", 4096, 1024), ("o_proj", 1024, 3072), ("dense up", 2816, 1024), ("lm_head", 32768, 1024)],
    "full": [("q_proj", 12288, 4096), ("o_proj", 4096, 12288), ("dense up", 11264, 4096)],
}
# (label, hidden, expert size, experts, top_k)
EXPERTS = {"mini": [("experts", 1024, 512, 64, 8)], "full": [("experts", 4096, 1280, 24, 8)]}
# (label, heads, KV heads, head size, window) of the two kinds of attention layers
ATTENTION = {
    "mini": [("full", 16, 4, 128, 0), ("sliding", 24, 4, 128, 512)],
    "full": [("full", 64, 8, 128, 0), ("sliding", 96, 8, 128, 512)],
}
BLOCK_SIZE = 16
DEFAULT_FORMATS = "bf16,fp8,int8_g128,int4_g32,q4_k,q6_k"


@dataclass(kw_only=True)
class Row:
    op: str
    shape: str
    format: str
    num_tokens: int
    microseconds: float
    gigabytes_per_second: float | None = None
    fraction_of_bandwidth: float | None = None
    gigaflops: float | None = None


def random_packed(fmt: Format, n: int, k: int) -> Tensor:
    """Realistic values at once: one quantised panel, repeated; GGUF blocks are random bits with small scales."""
    if fmt in (Format.Q4_K, Format.Q6_K):
        size, header = (4608, 128) if fmt == Format.Q4_K else (6720, 64)
        blocks = torch.randint(0, 256, (packed_bytes(fmt, n, k) // size, size), dtype=torch.uint8)
        blocks[:, :header] = torch.full((header // 2,), 1e-3, dtype=torch.float16).view(torch.uint8)
        return blocks.flatten()
    panel = quantize(torch.randn(32, k) / k**0.5, fmt)
    out = ops.advise_huge_pages(torch.empty(packed_bytes(fmt, n, k), dtype=torch.uint8))
    return out.view(-1, panel.numel()).copy_(panel).flatten()


def median_seconds(repeats: int, run: Callable[..., object], *args: object) -> float:
    run(*args)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(*args)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run_linears(x: Tensor, weights: list[Tensor], fmt: Format, n: int) -> None:
    for weight in weights:
        ops.linear(x, [weight], [fmt], [n])


def linear_rows(
    shapes: list[tuple[str, int, int]], fmt: Format, repeats: int, bandwidth: float
) -> Iterator[Row]:
    for label, n, k in shapes:
        if k % fmt.k_block and fmt in (Format.Q4_K, Format.Q6_K):
            continue
        size = packed_bytes(fmt, n, k)
        weights = [random_packed(fmt, n, k) for _ in range(max(2, (192 << 20) // size))]
        shape = f"{label} {n}x{k}"
        for num_tokens in (1, 2, 4, 8, 16):
            x = torch.randn(num_tokens, k).bfloat16()
            seconds = median_seconds(repeats, run_linears, x, weights, fmt, n)
            yield decode_row(
                "linear", shape, fmt.name.lower(), num_tokens, seconds / len(weights), size, bandwidth
            )
        x = torch.randn(512, k).bfloat16()
        seconds = median_seconds(repeats, run_linears, x, weights[:1], fmt, n)
        yield prefill_row("linear", shape, fmt.name.lower(), 512, seconds, 2 * 512 * n * k)


def decode_row(
    op: str, shape: str, name: str, num_tokens: int, seconds: float, size: int, bandwidth: float
) -> Row:
    rate = size / seconds
    return Row(
        op=op, shape=shape, format=name, num_tokens=num_tokens, microseconds=seconds * 1e6,
        gigabytes_per_second=rate / 1e9, fraction_of_bandwidth=rate / bandwidth,
    )  # fmt: skip


def prefill_row(op: str, shape: str, name: str, num_tokens: int, seconds: float, flops: int) -> Row:
    rate = flops / seconds / 1e9
    return Row(
        op=op, shape=shape, format=name, num_tokens=num_tokens, microseconds=seconds * 1e6, gigaflops=rate
    )


def run_layers(x: Tensor, layers: list[partial[Tensor]]) -> None:
    for layer in layers:
        layer(x, residual=x)


def moe_rows(
    shapes: list[tuple[str, int, int, int, int]], fmt: Format, repeats: int, bandwidth: float
) -> Iterator[Row]:
    for label, hidden, size, num_experts, top_k in shapes:
        if fmt in (Format.Q4_K, Format.Q6_K) and size % 256:
            continue
        sizes = ((size, hidden), (size, hidden), (hidden, size))
        per_expert = sum(packed_bytes(fmt, n, k) for n, k in sizes)
        layers = []
        for _ in range(max(1, (192 << 20) // (per_expert * num_experts))):
            experts = [random_packed(fmt, n * num_experts, k).view(num_experts, -1) for n, k in sizes]
            shared = [random_packed(fmt, n, k) for n, k in sizes]
            router = torch.randn(num_experts, hidden)
            layers.append(
                partial(
                    ops.moe, norm_weight=torch.zeros(hidden), router_weight=router, top_k=top_k, scaling_factor=3.0,
                    experts=experts, expert_formats=[fmt] * 3, num_experts=num_experts, expert_size=size,
                    shared=shared, shared_formats=[fmt] * 3, shared_size=size,
                )
            )  # fmt: skip

        shape = f"{label} {num_experts}x{size}x{hidden} top {top_k}"
        x = torch.randn(1, hidden).bfloat16()
        seconds = median_seconds(repeats, run_layers, x, layers) / len(layers)
        yield decode_row("moe", shape, fmt.name.lower(), 1, seconds, per_expert * (top_k + 1), bandwidth)
        x = torch.randn(512, hidden).bfloat16()
        seconds = median_seconds(repeats, run_layers, x, layers[:1])
        yield prefill_row("moe", shape, fmt.name.lower(), 512, seconds, 6 * 512 * hidden * size * (top_k + 1))


LayerCache = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def random_cache(num_blocks: int, kv_heads: int, dim: int, dtype: torch.dtype) -> LayerCache:
    """Keys, values and scales; random entries repeat, which no kernel notices."""
    cache = new_kv_cache(num_blocks, BLOCK_SIZE, kv_heads, dim, dtype)
    for tensor in cache[:2]:
        rows = tensor.view(num_blocks, -1)
        sample = torch.randn(rows[:64].shape) * (40 if dtype == torch.int8 else 1)
        rows.copy_(sample.to(dtype).repeat(-(-num_blocks // 64), 1)[:num_blocks])
    for scale in cache[2:]:
        if scale is not None:
            scale.fill_(0.02)
    return cache


def attention_rows(group: str, repeats: int, bandwidth: float) -> Iterator[Row]:
    """Decode and verification of drafts after long contexts, over too many caches for the processor; prefill."""
    for label, heads, kv_heads, dim, window in ATTENTION[group]:
        for dtype in (torch.bfloat16, torch.int8):
            name = str(dtype).removeprefix("torch.")
            for context in (1024, 8192, 32768) if not window else (4096,):
                table = torch.arange(context // BLOCK_SIZE, dtype=torch.int32)[None]
                for num_tokens in (1, 4):
                    seen = min(context, window + num_tokens - 1) if window else context
                    size = 2 * seen * kv_heads * dim * dtype.itemsize
                    caches = [
                        random_cache(context // BLOCK_SIZE, kv_heads, dim, dtype)
                        for _ in range(max(1, min(64, (96 << 20) // size)))
                    ]
                    q = torch.randn(num_tokens, heads, dim).bfloat16()
                    seconds = median_seconds(repeats, attend, q, caches, table, context, window) / len(caches)
                    shape = f"{label}, {heads}/{kv_heads} heads after {context}"
                    yield decode_row("attention", shape, name, num_tokens, seconds, size, bandwidth)
        q, table = torch.randn(2048, heads, dim).bfloat16(), torch.arange(128, dtype=torch.int32)[None]
        caches = [random_cache(128, kv_heads, dim, torch.bfloat16)]
        seconds = median_seconds(repeats, attend, q, caches, table, 2048, window)
        pairs = sum(min(position + 1, window or 2048) for position in range(2048))
        shape = f"{label}, {heads}/{kv_heads} heads"
        yield prefill_row("attention", shape, "bfloat16", 2048, seconds, 4 * pairs * heads * dim)


def attend(q: Tensor, caches: list[LayerCache], table: Tensor, context: int, window: int) -> None:
    lens = torch.tensor([context], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    for k, v, k_scale, v_scale in caches:
        ops.paged_attention(
            q, k, v, table, lens, cu_seqlens, window, q.shape[-1] ** -0.5, k_scale=k_scale, v_scale=v_scale
        )


def torch_rows(shapes: list[tuple[str, int, int]], repeats: int) -> Iterator[Row]:
    for label, n, k in shapes:
        x, weight = torch.randn(512, k).bfloat16(), torch.randn(n, k).bfloat16()
        seconds = median_seconds(repeats, torch.nn.functional.linear, x, weight)
        yield prefill_row("torch linear", f"{label} {n}x{k}", "bf16", 512, seconds, 2 * 512 * n * k)


def print_row(row: Row) -> None:
    text = f"{row.op:12} {row.shape:34} {row.format:10} {row.num_tokens:5} tokens {row.microseconds:10.1f} us"
    if row.gigabytes_per_second is not None:
        text += f" {row.gigabytes_per_second:7.1f} GB/s {row.fraction_of_bandwidth:5.2f} of the bandwidth"
    if row.gigaflops is not None:
        text += f" {row.gigaflops:7.0f} GFLOP/s"
    print(text, flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", default=DEFAULT_FORMATS)
    parser.add_argument("--shapes", choices=["mini", "full", "all"], default="all")
    parser.add_argument("--ops", default="linear,moe,attention,torch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    groups = ["mini", "full"] if args.shapes == "all" else [args.shapes]
    wanted = args.ops.split(",")

    bandwidth = ops.measure_bandwidth()
    rows: list[Row] = []

    def collect(found: Iterator[Row]) -> None:
        for row in found:
            rows.append(row)
            if not args.json:
                print_row(row)

    if not args.json:
        print(
            f"{build.loaded_isa() or 'reference'} kernels, {args.threads} threads, reads {bandwidth / 1e9:.1f} GB/s"
        )
    for group in groups:
        for name in args.formats.split(","):
            fmt = Format[name.upper()]
            if "linear" in wanted:
                collect(linear_rows(SHAPES[group], fmt, args.repeats, bandwidth))
            if "moe" in wanted:
                collect(moe_rows(EXPERTS[group], fmt, args.repeats, bandwidth))
        if "torch" in wanted:
            collect(torch_rows(SHAPES[group], args.repeats))
        if "attention" in wanted:
            collect(attention_rows(group, args.repeats, bandwidth))
    bandwidth_after = ops.measure_bandwidth()
    if args.json:
        machine = {"isa": build.loaded_isa(), "threads": args.threads, "torch": torch.__version__}
        report = {**machine, "bandwidth": bandwidth, "bandwidth_after": bandwidth_after}
        print(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(f"bandwidth again at the end: {bandwidth_after / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
