"""Products with packed weights on CUDA devices: the launches of `triton_matmul.py`.

Nothing here waits for the device. How many programs share the columns of a weight depends on its shape alone, so a
token's sums have one order whatever else is in the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from stepflash.kernels import cuda_layout, triton_finish, triton_matmul
from stepflash.kernels.formats import Format
from stepflash.kernels.triton_start import OVERLAP

WANTED_PROGRAMS = 448  # three or four for each multiprocessor of a large card
MIN_SPLIT_COLUMNS = 512
UNROLLED = 128  # columns of an iteration, where a step has fewer
MAX_SPLITS = 8
MAX_COUNTERS = 1 << 16

_counters: dict[tuple[torch.device, int], Tensor] = {}


def has_kernels(formats: Sequence[int]) -> bool:
    """Whether products with weights of these formats are made here; the references take Q4_K and Q6_K alone.

    Raises:
        NotImplementedError: some are, some not. The references would misread what lies in tiles.
    """
    supported = {cuda_layout.is_supported(Format(fmt)) for fmt in formats}
    if len(supported) > 1:
        raise NotImplementedError(
            "q4_k and q6_k weights beside others have no kernels on a GPU: load them as int8"
        )
    return True in supported


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights of a format and shape as the kernels take them: views of the codes and scales, and their sizes."""

    codes: Tensor
    scales: Tensor
    expert_codes: int  # elements from one expert's to the next
    expert_scales: int
    steps: int
    stride: int  # from one row of tiles to the next
    constants: dict[str, Any]


def view(packed: Tensor, fmt: Format, n: int, k: int) -> Packed:
    """Of uint8 [num_bytes] or [num_experts, num_bytes] as `cuda_layout` has them."""
    columns, constants = _constants(fmt, k)
    if fmt == Format.BF16:
        codes = packed.view(torch.bfloat16)
        return Packed(codes, codes, n * columns, 0, cdiv(columns, _step(fmt)), columns, constants)
    end, size = cuda_layout.num_code_bytes(fmt, n, k), packed.shape[-1]
    scales = packed.view(-1)[end:].view(torch.float32 if fmt == Format.FP8 else torch.int32)
    stride, steps = columns * cuda_layout.ROWS, columns // _step(fmt)
    if fmt.is_int4:  # in words of 32 bits
        return Packed(packed.view(torch.int32), scales, size // 4, size // 4, steps, stride // 8, constants)
    return Packed(packed, scales, size, size // 4, steps, stride, constants)


@cache
def _constants(fmt: Format, k: int) -> tuple[int, dict[str, Any]]:
    """Padded columns, and what the kernels are compiled for."""
    kind = 0 if fmt == Format.BF16 else 1 if fmt == Format.FP8 else 3 if fmt.is_int4 else 2
    constants = {"KIND": kind, "GROUP": fmt.group, "EVEN": k % _step(fmt) == 0}
    return cuda_layout.padded(fmt, 1, k)[1], constants


def _step(fmt: Format) -> int:
    """Columns of a step of the loop over k."""
    return 64 if fmt == Format.BF16 else 128 if fmt == Format.FP8 else 2 * fmt.group


def num_splits(n: int, k: int) -> int:
    """Programs that share a row's columns."""
    row_tiles: int = cdiv(n, cuda_layout.ROWS)
    return max(1, min(round(WANTED_PROGRAMS / row_tiles), k // MIN_SPLIT_COLUMNS, MAX_SPLITS))


def num_finished_splits(n: int, k: int, fmt: Format) -> int:
    """The same of a product with `Finish`, whose parts are read by one program each: in int4 a few more."""
    if fmt != Format.INT4_G32:
        return num_splits(n, k)
    row_tiles: int = cdiv(n, cuda_layout.ROWS)
    return max(1, min(1024 // row_tiles, k // MIN_SPLIT_COLUMNS, 2 * MAX_SPLITS))


def block_t_of(num_rows: int, formats: Sequence[int]) -> int:
    """Tokens of a program: the short side of the matrix unit, or enough to pay for decoding the weights.

    Eight are too few for Hopper's, except where a program has two columns for each (see `load_x_twice`).
    """
    sizes = (8, 16, 32) if all(fmt == Format.INT4_G32 for fmt in formats) else (16, 32)
    few = next((size for size in sizes if num_rows <= size), 0)
    return few or (64 if num_rows <= 512 else 128)


def tile_of(fmt: Format, n: int, k: int, block_t: int, is_pair: bool = False) -> dict[str, int]:
    """Rows and tokens of a program's tile for [n, k] weights (or a pair of them), and how far it reads ahead."""
    few = block_t <= 32
    is_even = cdiv(n, cuda_layout.ROWS) % 2 == 0
    rows = 128 if is_even and not is_pair and (not few or block_t == 8) else 64
    # Shared memory holds the stages: a step of 256 columns of 128 tokens is 64 KiB. On an H200, of 2 to 6 stages.
    if few:
        stages = 5 if fmt == Format.BF16 else 4 if fmt.is_int4 else 3
    else:
        stages = 2 if block_t > 64 and _step(fmt) == 256 else 3
    return {
        "ROWS": rows, "BLOCK_T": block_t, "num_warps": 4 if few else rows // 16, "STAGES": stages,
        "UNROLL": max(1, gcd(k // _step(fmt), max(1, UNROLLED // _step(fmt)))) if few and fmt != Format.BF16 else 1,
    }  # fmt: skip


def counters(device: torch.device) -> Tensor:
    """Zeros [MAX_COUNTERS] int32 that kernels count their programs with and leave as they were.

    Kernels that follow one another may share them, those of two streams may not.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _counters.get((device, stream))
    if found is None:
        with torch.inference_mode(False):
            found = _counters[device, stream] = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
    return found


@dataclass(frozen=True, slots=True)
class Finish:
    """What is to become of a product: the residual is added, `total` is the sum rounded to its dtype, `scaled` that
    times 1 + gain as bf16, if there is a gain."""

    residual: Tensor
    total: Tensor
    gain: Tensor | None
    scaled: Tensor


def matmul(
    x: Tensor, weights: Sequence[tuple[Tensor, Format, int]], splits: int, finish: Finish | None = None
) -> Tensor:
    """x [num_tokens, k] times up to three weights of one format side by side: [parts, num_tokens, sum of n] float32.

    Each weight is (packed, format, n). The result is the sum over the parts, in order: `splits` of them for few
    tokens, else one that was added up in the same order. With `finish`, of one weight, it means nothing.
    """
    fmt, k = weights[0][1], x.shape[1]
    sizes = [n for _, _, n in weights] + [0] * (3 - len(weights))
    views = [view(packed, fmt, n, k) for packed, _, n in weights]
    first = views[0]
    views += [first] * (3 - len(views))
    block_t = block_t_of(x.shape[0], [fmt])
    odd = [n for n in sizes if cdiv(n, cuda_layout.ROWS) % 2]  # one is enough for tiles of 64 rows
    tile = tile_of(fmt, odd[0] if odd else sizes[0], k, block_t)
    row_tiles, blocks = sum(cdiv(n, tile["ROWS"]) for n in sizes), cdiv(x.shape[0], block_t)
    is_split = splits > 1 and block_t <= 32
    shape = (splits if is_split else 1, x.shape[0], sum(sizes))
    out = torch.empty((0,) if finish and not is_split else shape, dtype=torch.float32, device=x.device)
    follow = (out,) * 5
    if finish is not None:
        gain = out if finish.gain is None else finish.gain
        follow = finish.residual, gain, finish.total, finish.scaled, counters(x.device)
        assert blocks * row_tiles <= MAX_COUNTERS
    triton_matmul.matmul[(blocks, row_tiles, splits if is_split else 1)](
        x, first.codes, first.scales, views[1].codes, views[1].scales, views[2].codes, views[2].scales, out, out,
        out, out, *follow, *sizes, 0, 0, 1, 0, x.shape[0], k, first.steps, first.stride, DENSE=True, SHARED=False,
        WEIGHTED=False, FINISH=finish is not None, HAS_GAIN=finish is not None and finish.gain is not None,
        SPLITS=splits, IS_SPLIT=is_split, **tile, **first.constants, **OVERLAP,
    )  # fmt: skip
    return out


def finish(parts: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum over parts [parts, num_tokens, size] in order, plus the residual, rounded once."""
    splits, num_tokens, size = parts.shape
    if splits == 1 and residual is None and dtype == torch.float32:
        return parts[0]
    out = torch.empty((num_tokens, size), dtype=dtype, device=parts.device)
    block = 1024
    triton_finish.finish[(num_tokens, cdiv(size, block))](
        parts, out if residual is None else residual, out, num_tokens, size, SPLITS=splits,
        HAS_RESIDUAL=residual is not None, BLOCK=block, **OVERLAP,
    )  # fmt: skip
    return out
