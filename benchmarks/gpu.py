"""Speed of the Triton kernels at the layer shapes of Step-3.5-Flash against the memory bandwidth of the same run.

    python benchmarks/gpu.py [--formats int4_g32,fp8,bf16] [--tokens 1,4,32,2048] [--context 32768] [--json]

First every operation is compared with its reference on the card; a difference ends the run. Then each is timed as a
CUDA graph of one call after another over several copies of its inputs, together far larger than the cache: median of
--repeats. Fractions are of the bandwidth that a sum over 2 GiB reads. Needs one CUDA device and Triton.
benchmarks/gpu_model.py times the whole architecture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stepflash.kernels import cuda_layout, ops, reference
from stepflash.kernels.formats import Format, parse_format, quantize

HEAD_DIM, NUM_KV_HEADS, WINDOW, BLOCK_SIZE = 128, 8, 512, 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model's layers: matrices [rows, columns] by name, experts, query heads of full and sliding layers."""

    hidden: int
    matrices: dict[str, tuple[int, int]]
    num_experts: int
    expert_size: int
    top_k: int


FULL = Shape(
    hidden=4096,
    matrices={"q_proj": (12288, 4096), "o_proj": (4096, 12288), "lm_head": (128896, 4096)},
    num_experts=288,
    expert_size=1280,
    top_k=8,
)
SMALL = Shape(hidden=256, matrices={"q_proj": (512, 256)}, num_experts=8, expert_size=128, top_k=2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on its inputs: bytes that it must read; flops with a multiply-add counted as two."""

    name: str
    format: str
    num_tokens: int
    num_bytes: int
    flops: int
    tolerance: float
    kernels: list[Callable[[], Tensor]]  # the same on several inputs
    plain: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    format: str
    num_tokens: int
    microseconds: float
    gb_per_s: float
    fraction_of_bandwidth: float
    tflops: float


def random_tiles(fmt: Format, experts: int, rows: int, columns: int, device: str) -> Tensor:
    """Random codes [experts, num_bytes] as a device's kernels take them, entries of about 1 / sqrt(columns)."""
    size, end = cuda_layout.num_bytes(fmt, rows, columns), cuda_layout.num_code_bytes(fmt, rows, columns)
    if fmt == Format.BF16:
        weight = torch.randn(experts, size // 2, device=device, dtype=torch.bfloat16) / columns**0.5
        return weight.view(torch.uint8)
    codes = torch.randint(0, 256, (experts, size), device=device, dtype=torch.uint8)
    if fmt == Format.FP8:
        codes &= 0xBF  # below 2, and no NaN
        codes[:, end:].view(torch.float32).fill_(1 / columns**0.5)
    else:
        codes[:, end:].view(torch.float16).fill_((0.2 if fmt.is_int4 else 0.0135) / columns**0.5)
    return codes


def small_weights(fmt: Format, experts: int, rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """One random matrix for every expert: as this device's kernels take it, and as the references do."""
    packed = quantize(torch.randn(rows, columns, device=device) / columns**0.5, fmt).view(-1)
    tiles = cuda_layout.from_panels(packed, fmt, rows, columns) if device == "cuda" else packed
    return tiles.repeat(experts, 1), packed.repeat(experts, 1)


def matrix_cases(shape: Shape, fmt: Format, num_tokens: int, device: str, is_check: bool) -> Iterator[Case]:
    # The references of integer formats round activations to int8, the kernels to bf16.
    tolerance = 2e-2 if fmt.group else 5e-3
    for name, (rows, columns) in shape.matrices.items():
        size = (fmt, 1, rows, columns, device)
        copies = 1 if is_check else num_copies(cuda_layout.num_bytes(fmt, rows, columns))
        pairs = [small_weights(*size)] if is_check else [(random_tiles(*size),) * 2 for _ in range(copies)]
        x = torch.randn(num_tokens, columns, device=device).bfloat16()
        rest = ([int(fmt)], [rows], None, 1e-5, None, None, torch.float32)
        yield Case(
            name=name,
            format=fmt.name.lower(),
            num_tokens=num_tokens,
            num_bytes=pairs[0][0].numel(),
            flops=2 * num_tokens * rows * columns,
            tolerance=tolerance,
            kernels=[lambda w=w, x=x, rest=rest: ops.linear(x, [w[0]], *rest) for w, _ in pairs],  # type: ignore[misc]
            plain=lambda x=x, w=pairs[0][1], rest=rest: reference.linear(x, [w[0]], *rest),  # type: ignore[misc]
        )


def expert_case(shape: Shape, fmt: Format, num_tokens: int, device: str, is_check: bool) -> Case:
    hidden, size, top_k, count = shape.hidden, shape.expert_size, shape.top_k, shape.num_experts
    sizes = [(size, hidden), (size, hidden), (hidden, size)]
    if is_check:
        pairs = [small_weights(fmt, count, *pair, device) for pair in sizes]
    else:
        pairs = [(random_tiles(fmt, count, *pair, device),) * 2 for pair in sizes]
    x = torch.randn(num_tokens, hidden, device=device).bfloat16()
    # Other experts each time, so that few tokens do not find theirs in the cache.
    routes = [
        torch.rand(num_tokens, count, device=device).topk(top_k).indices for _ in range(1 if is_check else 8)
    ]
    weights = torch.rand(num_tokens, top_k, device=device)

    def arguments(which: int, ids: Tensor) -> tuple[Any, ...]:
        return (
            x, None, 1e-5, None, None, top_k, 1.0, [pair[which] for pair in pairs], [int(fmt)] * 3, count, size, 7.0,
            [], [], 0, None, ids, weights, None,
        )  # fmt: skip

    met = sum(len(ids.unique()) for ids in routes) / len(routes)
    return Case(
        name="experts",
        format=fmt.name.lower(),
        num_tokens=num_tokens,
        num_bytes=int(met * sum(pair[0][0].numel() for pair in pairs)),
        flops=2 * num_tokens * top_k * 3 * hidden * size,
        tolerance=2e-2 if fmt.group else 5e-3,
        kernels=[lambda ids=ids: torch.ops.stepflash.moe(*arguments(0, ids)) for ids in routes],  # type: ignore[misc]
        plain=lambda: reference.moe(*arguments(1, routes[0])),
    )


def num_copies(num_bytes: int) -> int:
    """Of inputs, so that they do not stay in a GPU's cache."""
    return max(1, min(16, -(-(400 << 20) // num_bytes)))


def attention_case(heads: int, window: int, num_seqs: int, queries: int, context: int, device: str) -> Case:
    """`queries` of each sequence at the end of `context` positions."""
    blocks = -(-context // BLOCK_SIZE)
    shape = (num_seqs * blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    table = torch.randperm(num_seqs * blocks, device=device).int().view(num_seqs, blocks)
    q = torch.randn(num_seqs * queries, heads, HEAD_DIM, device=device).bfloat16()
    lens = torch.full((num_seqs,), context, dtype=torch.int32, device=device)
    bounds = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * queries
    args = (q, keys, values, table, lens, bounds, window, HEAD_DIM**-0.5)
    first = context - queries
    seen = [min(p + 1, window or p + 1) for p in range(first, context)]  # by each query
    read = min(context, window + queries - 1) if window else context
    return Case(
        name=f"attention, {f'window {window}' if window else f'{context} keys'}",
        format="bf16",
        num_tokens=num_seqs * queries,
        num_bytes=num_seqs * read * 2 * NUM_KV_HEADS * HEAD_DIM * 2,
        flops=num_seqs * sum(seen) * heads * HEAD_DIM * 4,
        tolerance=2e-2,
        kernels=[lambda: ops.paged_attention(*args)],
        plain=lambda: reference.paged_attention(*args),
    )


def cases(
    shape: Shape, formats: list[Format], tokens: list[int], context: int, device: str, is_check: bool = False
) -> Iterator[Case]:
    """One after the other, so that the memory of one is free for the next."""
    for num_tokens in tokens:
        for fmt in formats:
            yield from matrix_cases(shape, fmt, num_tokens, device, is_check)
            yield expert_case(shape, fmt, num_tokens, device, is_check)
        for heads, window in ((64, 0), (96, WINDOW)):
            if num_tokens <= 64:  # decode: a query of each sequence
                yield attention_case(heads, window, num_tokens, 1, context, device)
            else:
                yield attention_case(heads, window, 1, num_tokens, max(num_tokens, context // 8), device)


def difference(case: Case) -> float:
    """Relative, of the norms."""
    expected = case.plain().float()
    return float((case.kernels[0]().float() - expected).norm() / expected.norm())


def check(shape: Shape, formats: list[Format], device: str) -> list[str]:
    """What differs from its reference, in a sentence each."""
    wrong = []
    for case in cases(shape, formats, [1, 5, 40, 130], 1100, device, is_check=True):
        found = difference(case)
        if not found < case.tolerance:
            wrong.append(f"{case.name} {case.format}, {case.num_tokens} tokens: off by {found:.3g}")
    return wrong


def microseconds(kernels: list[Callable[[], Tensor]], repeats: int) -> float:
    """Median of GPU time a call, in a graph of all of them, the cache cold for the first."""
    calls = kernels * max(1, 8 // len(kernels))
    for work in kernels:
        work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in calls:
            work()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default="int4_g32,fp8,bf16")
    parser.add_argument("--tokens", default="1,4,32,2048", help="up to 64: decode; more: prefill")
    parser.add_argument("--context", type=int, default=32768, help="keys of a decoding sequence")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this measures one; benchmarks/kernels.py measures the CPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    formats = [parse_format(name, FULL.hidden) for name in options.formats.split(",")]
    if wrong := check(SMALL, formats, "cuda"):
        print("kernels differ from their references:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    bandwidth = ops.measure_bandwidth(2 << 30, device="cuda")
    rows = []
    tokens = [int(n) for n in options.tokens.split(",")]
    header = f"{torch.cuda.get_device_name()}, {bandwidth / 1e9:.0f} GB/s read"
    if not options.json:
        print(
            header,
            f"{'':24}{'format':10}{'tokens':>7}{'us':>10}{'GB/s':>8}{'of read':>9}{'TFLOP/s':>9}",
            sep="\n",
        )
    for case in cases(FULL, formats, tokens, options.context, "cuda"):
        time = microseconds(case.kernels, options.repeats)
        rate = case.num_bytes / time * 1e6
        row = Row(
            name=case.name, format=case.format, num_tokens=case.num_tokens, microseconds=time,
            gb_per_s=rate / 1e9, fraction_of_bandwidth=rate / bandwidth, tflops=case.flops / time / 1e6,
        )  # fmt: skip
        rows.append(row)
        if not options.json:
            print(
                f"{row.name:24}{row.format:10}{row.num_tokens:7}{row.microseconds:10.1f}{row.gb_per_s:8.0f}"
                f"{row.fraction_of_bandwidth:9.2f}{row.tflops:9.1f}"
            )
    if options.json:
        print(
            json.dumps(
                {"device": header, "bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}, indent=1
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
