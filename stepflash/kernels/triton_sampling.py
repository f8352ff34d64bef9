# mypy: ignore-errors
"""Device code of the greedy choice, in Triton; `cuda.py` launches it."""

import triton
import triton.language as tl

from stepflash.kernels.triton_start import enter


@triton.jit
def best_of_chunk(logits, values, ids, stride, limit, chunks, BLOCK: tl.constexpr):
    """Grid (num_rows, chunks): the best of BLOCK tokens, the lowest id of equals. NaN counts as infinity."""
    enter()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row * stride + token, mask=token < limit, other=float("-inf"))
    logit = tl.where(logit == logit, logit, float("inf"))
    value, place = tl.max(logit, 0, return_indices=True)
    tl.store(values + row * chunks + chunk, value)
    tl.store(ids + row * chunks + chunk, chunk * BLOCK + place)


@triton.jit
def best_of_row(chunk_values, chunk_ids, values, ids, chunks, BLOCK: tl.constexpr):
    """Grid (num_rows,): the best of the chunks."""
    enter()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    value = tl.load(chunk_values + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    best, place = tl.max(value, 0, return_indices=True)
    tl.store(values + row, best)
    tl.store(ids + row, tl.load(chunk_ids + row * chunks + tl.minimum(place, chunks - 1)).to(tl.int64))
