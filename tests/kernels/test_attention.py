"""Paged attention: brute force (one query, one head at a time), the reference, and bits that ignore the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stepflash.kernels import ops, reference
from stepflash.kernels.kv_layout import is_interleaved, new_kv_cache, read_slots

from .conftest import opcheck


@dataclass
class Paged:
    """Random keys and values of some sequences, scattered over blocks in random order."""

    k: list[Tensor]  # [length, num_kv_heads, head_dim] each
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


def paged(lengths: list[int], num_kv_heads: int, head_dim: int, block_size: int, int8: bool = False) -> Paged:
    needed = [-(-n // block_size) for n in lengths]
    num_blocks = sum(needed) + 2
    order = torch.randperm(num_blocks).tolist()
    table = torch.full(
        (len(lengths), max(needed) + 1), -7, dtype=torch.int32
    )  # unused entries are never read
    dtype = torch.int8 if int8 else torch.bfloat16
    k_cache, v_cache, *scales = new_kv_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype)
    for stale in (k_cache, v_cache, *scales):  # whatever was there before must not matter
        if stale is not None:
            stale.fill_(77 if stale.dtype == torch.int8 else float("nan"))
    keys, values = [], []
    for s, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        table[s, :count] = torch.tensor(blocks)
        k, v = (
            torch.randn(length, num_kv_heads, head_dim).bfloat16(),
            torch.randn(length, num_kv_heads, head_dim).bfloat16(),
        )
        slots = torch.tensor([blocks[p // block_size] * block_size + p % block_size for p in range(length)])
        ops.cache_write(k, v, k_cache, v_cache, slots, *scales)
        keys.append(k), values.append(v)
    return Paged(keys, values, k_cache, v_cache, table, *scales)


def run(
    p: Paged,
    q: Tensor,
    seq_lens: list[int],
    counts: list[int],
    window: int,
    gate: Tensor | None = None,
    first_key: int = 0,
) -> Tensor:
    cu_seqlens = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    scale = q.shape[-1] ** -0.5
    return ops.paged_attention(
        q,
        p.k_cache,
        p.v_cache,
        p.block_table,
        lens,
        cu_seqlens,
        window,
        scale,
        first_key,
        gate,
        p.k_scale,
        p.v_scale,
    )


def brute_force(
    p: Paged, q: Tensor, seq_lens: list[int], counts: list[int], window: int, gate: Tensor | None
) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64)
    group, token = q.shape[1] // p.k[0].shape[1], 0
    for s, count in enumerate(counts):
        for position in range(seq_lens[s] - count, seq_lens[s]):
            low = max(0, position - window + 1) if window else 0
            for head in range(q.shape[1]):
                k, v = (
                    p.k[s][low : position + 1, head // group].double(),
                    p.v[s][low : position + 1, head // group].double(),
                )
                weights = (k @ q[token, head].double() / math.sqrt(q.shape[-1])).softmax(0)
                out[token, head] = weights @ v
                if gate is not None:
                    out[token, head] *= torch.sigmoid(gate[token, head].double())
            token += 1
    return out


CASES = [
    # lengths, queries per sequence, heads, kv heads, head_dim, block size, window
    ([1], [1], 4, 4, 32, 16, 0),
    ([70], [1], 8, 2, 64, 16, 0),
    ([5, 130, 64], [5, 3, 64], 6, 2, 128, 16, 0),
    ([200, 90], [1, 4], 12, 4, 32, 8, 24),
    ([150], [150], 4, 1, 96, 32, 33),
    ([65, 1, 300], [1, 1, 2], 16, 4, 128, 64, 0),
    ([40, 7], [40, 0], 24, 2, 64, 6, 9),
    ([1100, 600], [2, 1], 12, 1, 256, 48, 0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gated", [False, True])
@torch.inference_mode()
def test_against_brute_force(case, gated: bool) -> None:
    torch.manual_seed(0)
    lengths, counts, num_heads, num_kv_heads, head_dim, block_size, window = case
    p = paged(lengths, num_kv_heads, head_dim, block_size)
    q = torch.randn(sum(counts), num_heads, head_dim).bfloat16().float()
    gate = torch.randn(sum(counts), num_heads) if gated else None
    expected = brute_force(p, q, lengths, counts, window, gate)
    # Probabilities are rounded to bf16: relative 2^-9 each.
    assert (run(p, q, lengths, counts, window, gate) - expected).abs().max() < 4e-3 * expected.abs().max()
    bf16 = run(p, q.bfloat16(), lengths, counts, window, gate)
    assert bf16.dtype == torch.bfloat16
    assert (bf16 - expected).abs().max() < 8e-3 * expected.abs().max()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [0, 100])
@torch.inference_mode()
def test_long_context_against_the_reference(int8: bool, window: int) -> None:
    """Several splits of the context, merged; two threads take them apart."""
    torch.manual_seed(1)
    torch.set_num_threads(2)
    lengths, counts = [1700, 530], [3, 1]
    p = paged(lengths, 2, 64, 16, int8)
    q, gate = torch.randn(4, 8, 64), torch.randn(4, 8)
    cu_seqlens, lens = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    expected = reference.paged_attention(
        q.bfloat16().float(),
        p.k_cache,
        p.v_cache,
        p.block_table,
        lens,
        cu_seqlens,
        window,
        0.125,
        0,
        gate,
        p.k_scale,
        p.v_scale,
    )
    actual = run(p, q, lengths, counts, window, gate)
    assert (actual - expected).abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [0, 70])
@torch.inference_mode()
def test_chunks_batches_and_threads_do_not_change_a_bit(int8: bool, window: int) -> None:
    torch.manual_seed(2)
    length, others = 1300, [700, 20]
    p = paged([length, *others], 2, 32, 16, int8)
    q = torch.randn(length, 6, 32).bfloat16()

    def chunk(begin: int, end: int) -> Tensor:
        return run_first(p, q[begin:end], end, window)

    whole = chunk(0, length)
    for step in (1, 4, 64, 333):
        starts = range(0, length, step) if step > 1 else range(length - 40, length)
        for begin in starts:
            end = min(begin + step, length)
            assert torch.equal(chunk(begin, end), whole[begin:end])
    batched = run(
        p, torch.cat([q[-3:], torch.randn(5, 6, 32).bfloat16()]), [length, *others], [3, 4, 1], window
    )
    assert torch.equal(batched[:3], whole[-3:])
    torch.set_num_threads(2)
    assert torch.equal(chunk(length - 1, length), whole[-1:])
    assert torch.equal(chunk(0, length), whole)


def run_first(p: Paged, q: Tensor, seq_len: int, window: int) -> Tensor:
    first = Paged(
        p.k[:1], p.v[:1], p.k_cache, p.v_cache, p.block_table[:1].contiguous(), p.k_scale, p.v_scale
    )
    return run(first, q, [seq_len], [q.shape[0]], window)


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_extreme_gates_and_scores(int8: bool) -> None:
    """Logits far out: a gate is closed or open, one key takes all, and nothing overflows."""
    torch.manual_seed(5)
    p = paged([600], 2, 64, 16, int8)
    q = 1000 * torch.randn(1, 8, 64).bfloat16().float()
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 3.0]])
    cu_seqlens, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([600], dtype=torch.int32)
    rest = (p.block_table, lens, cu_seqlens, 0, 0.125, 0, gate, p.k_scale, p.v_scale)
    expected = reference.paged_attention(q, p.k_cache, p.v_cache, *rest)
    actual = run(p, q, [600], [1], 0, gate)
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() < 2e-2 * expected.abs().max()


@torch.inference_mode()
def test_blocks_below_the_window_are_not_read() -> None:
    p = paged([100], 1, 32, 16)
    q = torch.randn(2, 2, 32)
    expected = run(p, q, [100], [2], 20)
    p.k_cache[p.block_table[0, :4].long()] = float("nan")  # keys 0..63; the oldest visible is 79
    p.block_table[0, :4] = -1
    assert torch.equal(run(p, q, [100], [2], 20), expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [0, 20])
@torch.inference_mode()
def test_what_is_not_a_number_reaches_those_who_see_it(window: int, int8: bool, native: bool) -> None:
    if not native:
        pytest.skip("the reference multiplies hidden values by zero, and that is no number either")
    p = paged([90], 2, 64, 16, int8)
    k, v = torch.randn(2, 1, 2, 64)
    k[0, 0, 3] = v[0, 0, 5] = float("nan")  # of the first KV head only
    slot = torch.tensor([int(p.block_table[0, 50 // 16]) * 16 + 50 % 16])
    ops.cache_write(k, v, p.k_cache, p.v_cache, slot, p.k_scale, p.v_scale)
    actual = run(p, torch.randn(60, 4, 64), [90], [60], window)  # positions 30 to 89
    is_broken = actual.isnan().any(-1)  # [num_tokens, num_heads]
    assert is_broken[20 : 40 if window else 60, :2].all()  # from position 50 on, as far as the window goes
    assert not is_broken[:, 2:].any()
    # Rows computed together may share the fate; the engine ends the whole request.
    assert not is_broken[50 if window else 60 :].any()
    assert not (int8 and is_broken[:20].any())


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_cached_attention_writes_and_attends(int8: bool) -> None:
    p = paged([40], 2, 32, 16, int8)
    q, k, v = torch.randn(3, 4, 32), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    slots = torch.tensor([int(p.block_table[0, i // 16]) * 16 + i % 16 for i in (37, 38, 39)])
    lens, cu_seqlens = torch.tensor([40], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    copies = [
        p.k_cache.clone(),
        p.v_cache.clone(),
        *(s.clone() if s is not None else None for s in (p.k_scale, p.v_scale)),
    ]
    ops.cache_write(k, v, copies[0], copies[1], slots, *copies[2:])
    rest = (p.block_table, lens, cu_seqlens, 20, 0.2, 0)
    expected = ops.paged_attention(q, *copies[:2], *rest, None, *copies[2:])
    actual = ops.cached_attention(q, k, v, p.k_cache, p.v_cache, slots, *rest, p.k_scale, p.v_scale)
    assert torch.equal(actual, expected)
    assert all(
        torch.equal(
            written.view(torch.uint8), copy.view(torch.uint8)
        )  # bits: the rest of the cache is not a number
        for written, copy in zip((p.k_cache, p.v_cache), copies[:2], strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [(torch.bfloat16, 8), (torch.int8, 8), (torch.bfloat16, 5), (torch.int8, 5), (torch.float32, 8)],
)
@torch.inference_mode()
def test_cache_write(dtype: torch.dtype, block_size: int) -> None:
    """Every layout gives back what was stored, natively written or not, and nothing else changes."""
    k, v = torch.randn(5, 2, 32).bfloat16(), torch.randn(5, 2, 32).bfloat16()
    slots, stored = torch.tensor([3, -1, 0, 17, 19]), [0, 2, 3, 4]
    made = []
    for write in (ops.cache_write, reference.cache_write):
        k_cache, v_cache, *scales = new_kv_cache(4, block_size, 2, 32, dtype)
        assert is_interleaved(k_cache) == (dtype != torch.float32 and block_size == 8)
        write(k, v, k_cache, v_cache, slots, *scales)
        made.append([k_cache, v_cache, *(s for s in scales if s is not None)])
        everything = torch.arange(4 * block_size)
        for cache, scale, x, is_value in ((k_cache, scales[0], k, False), (v_cache, scales[1], v, True)):
            found = read_slots(cache, scale, everything, is_value=is_value)
            peak = x[stored].float().abs().amax(-1, keepdim=True)
            allowed = peak / 254 * 1.0001 if dtype == torch.int8 else 0.0
            assert ((found[slots[stored]] - x[stored].float()).abs() <= allowed).all()
            assert found.abs().sum((1, 2)).nonzero().flatten().tolist() == [0, 3, 17, 19]
    for actual, expected in zip(*made, strict=True):
        assert torch.equal(actual, expected)


def test_wrong_arguments_are_refused() -> None:
    p = paged([40], 2, 32, 16)
    q = torch.randn(3, 4, 32)
    with pytest.raises(RuntimeError, match="room for"):
        run(p, q, [500], [3], 0)
    with pytest.raises(RuntimeError, match=r"block_table\[0, 3\] is -7"):
        run(p, q, [50], [3], 0)
    with pytest.raises(RuntimeError, match="cu_seqlens must run"):
        run(p, q, [40], [2], 0)
    with pytest.raises(RuntimeError, match="does not fit"):
        run(p, torch.randn(3, 3, 32), [40], [3], 0)
    with pytest.raises(RuntimeError, match="slot 999"):
        ops.cache_write(p.k[0][:1], p.v[0][:1], p.k_cache, p.v_cache, torch.tensor([999]))


def test_opcheck() -> None:
    p = paged([40], 2, 32, 16)
    op = torch.ops.stepflash
    lens, cu_seqlens = torch.tensor([40], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    args = (torch.randn(3, 4, 32), p.k_cache, p.v_cache, p.block_table, lens, cu_seqlens, 0, 0.1)
    opcheck(op.paged_attention, args)
    opcheck(op.cache_write, (p.k[0][:2], p.v[0][:2], p.k_cache, p.v_cache, torch.tensor([4, 5])))


@pytest.mark.parametrize("window", [0, 30])
@torch.inference_mode()
def test_keys_before_the_first_are_never_visible(window: int) -> None:
    p = paged([100], 1, 32, 16)
    q = torch.randn(100, 2, 32).bfloat16().float()
    actual = run(p, q, [100], [100], window, first_key=3)
    assert torch.equal(actual[:3], torch.zeros(3, 2, 32))  # nothing to see: zeros
    shifted = Paged([p.k[0][3:]], [p.v[0][3:]], p.k_cache, p.v_cache, p.block_table)
    expected = brute_force(shifted, q[3:], [97], [97], window, None)
    assert (actual[3:] - expected).abs().max() < 4e-3 * expected.abs().max()
