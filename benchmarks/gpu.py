"""Speed of the Triton kernels at the layer shapes of Step-3.5-Flash against the memory bandwidth of the same run.

    python benchmarks/gpu.py [--formats int4_g32,fp8,bf16] [--tokens 1,4,32,2048] [--context 32768] [--json]

First every operation is compared with its reference on the card; a difference ends the run. Then each is timed with
CUDA events, a buffer larger than the cache written in between: median of --repeats. Fractions are of the bandwidth
that a sum over 2 GiB reads. Needs one CUDA device and Triton; never run by the authors, who had none.
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

from stepflash.kernels import ops, reference
from stepflash.kernels.formats import Format, packed_bytes, parse_format, quantize

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
    kernel: Callable[[], Tensor]
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


def packed_experts(fmt: Format, experts: int, rows: int, columns: int, device: str) -> Tensor:
    """One random matrix, packed and copied for every expert."""
    one = quantize(torch.randn(rows, columns, device=device) / columns**0.5, fmt)
    return one.repeat(experts, 1)


def matrix_cases(shape: Shape, fmt: Format, num_tokens: int, device: str) -> Iterator[Case]:
    # The references of integer formats round activations to int8, the kernels to bf16.
    tolerance = 2e-2 if fmt.group else 5e-3
    for name, (rows, columns) in shape.matrices.items():
        weight = packed_experts(fmt, 1, rows, columns, device)[0]
        x = torch.randn(num_tokens, columns, device=device).bfloat16()
        linear = (x, [weight], [int(fmt)], [rows], None, 1e-5, None, None, torch.float32)
        yield Case(
            name=name,
            format=fmt.name.lower(),
            num_tokens=num_tokens,
            num_bytes=weight.numel(),
            flops=2 * num_tokens * rows * columns,
            tolerance=tolerance,
            kernel=lambda linear=linear: ops.linear(*linear),  # type: ignore[misc]
            plain=lambda linear=linear: reference.linear(*linear),  # type: ignore[misc]
        )


def expert_case(shape: Shape, fmt: Format, num_tokens: int, device: str) -> Case:
    hidden, size, top_k = shape.hidden, shape.expert_size, shape.top_k
    sizes = [(size, hidden), (size, hidden), (hidden, size)]
    experts = [packed_experts(fmt, shape.num_experts, *pair, device) for pair in sizes]
    x = torch.randn(num_tokens, hidden, device=device).bfloat16()
    ids = torch.rand(num_tokens, shape.num_experts, device=device).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, device=device)
    moe: tuple[Any, ...] = (
        x, None, 1e-5, None, None, top_k, 1.0, experts, [int(fmt)] * 3, shape.num_experts, size, 7.0, [], [], 0,
        None, ids, weights, None,
    )  # fmt: skip
    return Case(
        name="experts",
        format=fmt.name.lower(),
        num_tokens=num_tokens,
        num_bytes=len(ids.unique()) * sum(packed_bytes(fmt, *pair) for pair in sizes),
        flops=2 * num_tokens * top_k * 3 * hidden * size,
        tolerance=2e-2 if fmt.group else 5e-3,
        kernel=lambda: torch.ops.stepflash.moe(*moe),
        plain=lambda: reference.moe(*moe),
    )


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
        kernel=lambda: ops.paged_attention(*args),
        plain=lambda: reference.paged_attention(*args),
    )


def cases(
    shape: Shape, formats: list[Format], tokens: list[int], context: int, device: str
) -> Iterator[Case]:
    """One after the other, so that the memory of one is free for the next."""
    for num_tokens in tokens:
        for fmt in formats:
            yield from matrix_cases(shape, fmt, num_tokens, device)
            yield expert_case(shape, fmt, num_tokens, device)
        for heads, window in ((64, 0), (96, WINDOW)):
            if num_tokens <= 64:  # decode: a query of each sequence
                yield attention_case(heads, window, num_tokens, 1, context, device)
            else:
                yield attention_case(heads, window, 1, num_tokens, max(num_tokens, context // 8), device)


def difference(case: Case) -> float:
    """Relative, of the norms."""
    expected = case.plain().float()
    return float((case.kernel().float() - expected).norm() / expected.norm())


def check(shape: Shape, formats: list[Format], device: str) -> list[str]:
    """What differs from its reference, in a sentence each."""
    wrong = []
    for case in cases(shape, formats, [1, 5, 130], 1100, device):
        found = difference(case)
        if not found < case.tolerance:
            wrong.append(f"{case.name} {case.format}, {case.num_tokens} tokens: off by {found:.3g}")
    return wrong


def microseconds(work: Callable[[], Tensor], repeats: int) -> float:
    """Median of GPU time, the cache cold."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    work()  # compiles
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
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
        time = microseconds(case.kernel, options.repeats)
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
