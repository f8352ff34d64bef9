"""Compiles every launch of the Triton kernels at the sizes of Step-3.5-Flash for a given GPU, which need not be here.

Run by test_cuda.py in a process of its own: `python -m tests.kernels.triton_compile 90`. Prints a line a kernel.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepflash.kernels import (
    cuda,
    cuda_layer,
    cuda_layout,
    triton_attention,
    triton_finish,
    triton_matmul,
    triton_norm,
    triton_router,
    triton_sampling,
)
from stepflash.kernels.formats import Format

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip

DUMP = Path(folder) if (folder := os.environ.get("STEPFLASH_CUBINS")) else None  # where the machine code goes


class Compiler:
    """Stands in for a kernel: a launch compiles it for the target, as the launcher would (1 is a constant)."""

    def __init__(self, kernel: Any, target: GPUTarget, seen: dict[str, str]) -> None:
        self.kernel, self.target, self.seen = kernel, target, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        names = [p.name for p in self.kernel.params]
        given = dict(zip(names, args, strict=False)) | kwargs
        signature, constants = {}, {}
        for p in self.kernel.params:
            value = given[p.name]
            if p.is_constexpr or (type(value) is int and value == 1 and not p.do_not_specialize):
                signature[p.name], constants[p.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[p.name] = _TYPES[value.dtype]
            else:
                signature[p.name] = "fp32" if isinstance(value, float) else "i32"
        # As the launcher: addresses and sizes that are multiples of 16 are taken to be so.
        hints = {
            (i,): [["tt.divisibility", 16]]
            for i, p in enumerate(self.kernel.params)
            if p.name not in constants
            and not p.do_not_specialize
            and (
                isinstance(given[p.name], torch.Tensor)
                or (type(given[p.name]) is int and given[p.name] % 16 == 0)
            )
        }
        key = f"{self.kernel.__name__} {signature} {constants} {hints}"
        if key not in self.seen:
            options = {name: value for name, value in kwargs.items() if name not in names}
            source = ASTSource(self.kernel, signature, constants, hints)
            compiled = triton.compile(source, target=self.target, options=options)
            self.seen[key] = compiled.asm["ptx"]
            if DUMP:
                (DUMP / f"{self.kernel.__name__}.{len(self.seen)}.cubin").write_bytes(compiled.asm["cubin"])
            print(
                len(self.seen),
                self.kernel.__name__,
                f"shared memory {compiled.metadata.shared} B",
                constants,
                flush=True,
            )


def packed(fmt: Format, n: int, k: int, experts: int = 0) -> torch.Tensor:
    return torch.empty(
        (*((experts,) if experts else ()), cuda_layout.num_bytes(fmt, n, k)), dtype=torch.uint8
    )


def compile_layer(
    x: torch.Tensor,
    fmt: Format,
    heads: list[torch.Tensor],
    experts: list[torch.Tensor],
    shared: list[torch.Tensor],
    router: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """A layer of experts and one without."""
    num_tokens, norm, codes = x.shape[0], torch.zeros(4096), [int(fmt)] * 3
    cache = [torch.zeros(4, 16, 8, 128, dtype=torch.bfloat16) for _ in range(2)]
    lens, bounds = torch.ones(1, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    slots, table = torch.zeros(num_tokens, dtype=torch.long), torch.zeros(1, 64, dtype=torch.int32)
    cached = cuda_layer.Cached(*cache, slots, table, lens, bounds, 0, 0.1, 0, None, None)
    angle, head_norm = torch.zeros(num_tokens, 32), torch.zeros(128)
    scaled = cuda_layer.times_gain(x, norm)
    cuda_layer.attention(
        x, scaled, heads, [*codes, 0], 64, 128, head_norm, head_norm, 1e-5, angle, angle, cached,
        packed(fmt, 4096, 8192), int(fmt), norm,
    )  # fmt: skip
    if num_tokens <= 64:
        cuda_layer.feed_forward(
            x, scaled, 1e-5, *router, 8, 3.0, experts, codes, 288, 1280, 7.0, shared, codes, 1280, None, norm
        )
    wide = [packed(fmt, *shape) for shape in ((11264, 4096), (11264, 4096), (4096, 11264))]
    cuda_layer.feed_forward(
        x, scaled, 1e-5, None, None, 0, 1.0, [], [], 0, 0, None, wide, codes, 11264, None, norm
    )


def main(capability: int) -> None:
    seen: dict[str, str] = {}
    target = GPUTarget("cuda", capability, 32)
    kernels: list[tuple[ModuleType, list[str]]] = [
        (triton_attention, ["attend", "merge_splits", "write_slots"]),
        (triton_norm, ["rms_norm", "row_scales", "norm_rope", "finish_heads"]),
        (triton_matmul, ["matmul", "swiglu"]),
        (triton_finish, ["combine", "finish", "gated", "times_gain"]),
        (triton_sampling, ["best_of_chunk", "best_of_row"]),
        (triton_router, ["router_logits", "choose_experts", "group_rows"]),
    ]
    for module, names in kernels:
        for name in names:
            setattr(module, name, Compiler(getattr(module, name), target, seen))

    for num_tokens in (1, 4, 16, 32, 512):
        x, norm = torch.zeros(num_tokens, 4096, dtype=torch.bfloat16), torch.zeros(4096)
        cuda.add_rms_norm(x, x, norm, 1e-5)
        for fmt in (Format.BF16, Format.FP8, Format.INT8_G128, Format.INT4_G32, Format.INT4_G128):
            shapes = [(1280, 4096), (1280, 4096), (4096, 1280)]
            weights, codes = [packed(fmt, *shape, experts=2) for shape in shapes], [int(fmt)] * 3
            router = torch.zeros(288, 4096), torch.zeros(288)
            shared = [w[0] for w in weights]
            # Many rows are sorted by what is not compiled here: it wants to see experts.
            ids = torch.arange(num_tokens * 8).view(-1, 8) % 2 if num_tokens > 64 else None
            cuda.moe(
                x, norm, 1e-5, *router, 8, 3.0, weights, codes, 288, 1280, 7.0, shared, codes, 1280, None, ids,
                None if ids is None else ids.float(), x,
            )  # fmt: skip
            heads = [packed(fmt, n, 4096) for n in (8192, 1024, 1024)] + [packed(Format.BF16, 64, 4096)]
            angle = torch.zeros(num_tokens, 32)
            cuda.qkv_gate(
                x,
                norm,
                heads,
                [int(fmt)] * 3 + [0],
                64,
                8,
                128,
                torch.zeros(128),
                torch.zeros(128),
                1e-5,
                angle,
                angle,
            )
            if fmt in (Format.BF16, Format.INT4_G32):
                compile_layer(x, fmt, heads, weights, shared, router)
            wide, gate = torch.zeros(num_tokens, 8192, dtype=torch.bfloat16), torch.zeros(num_tokens, 64)
            cuda.linear(wide, [packed(fmt, 4096, 8192)], [int(fmt)], [4096], gate=gate, residual=x)
    for heads, half, window in ((64, 32, 0), (96, 64, 512)):
        q, k = torch.zeros(2, heads, 128, dtype=torch.bfloat16), torch.zeros(2, 8, 128, dtype=torch.bfloat16)
        angle = torch.zeros(2, half)
        cuda.qk_norm_rope(q, k, torch.zeros(128), torch.zeros(128), 1e-5, angle, angle)
        for dtype in (torch.bfloat16, torch.int8, torch.float32):
            cache = [torch.zeros(4, 16, 8, 128, dtype=dtype) for _ in range(2)]
            scales = [torch.zeros(4, 16, 8) if dtype == torch.int8 else None for _ in range(2)]
            cuda.cache_write(k, k, *cache, torch.zeros(2, dtype=torch.long), *scales)
            table = torch.zeros(2, 64, dtype=torch.int32)
            for seqs, length in ((2, 64), (1, 64), (2, 1)):  # split; one sequence; a table of one chunk
                lens = torch.ones(seqs, dtype=torch.int32)
                bounds = torch.arange(seqs + 1, dtype=torch.int32)
                cuda.paged_attention(
                    q[:seqs], *cache, table[:seqs, :length], lens, bounds, window, 0.1, 0, q[:seqs, :, 0], *scales
                )  # fmt: skip
    cuda.best_tokens(torch.zeros(2, 128896), 128815)
    print(f"compiled {len(seen)} kernels for sm_{capability}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
