"""Cache sizes against the numbers of the model's specification, and the attention op against dense attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.attend import PagedAttention
from stepflash.engine.kv_cache import (
    FULL,
    LOOKAHEAD_SLOTS,
    SLIDING,
    CacheLimits,
    KVCache,
    LayerCache,
    block_bytes,
    plan_blocks,
    sliding_blocks_per_sequence,
)
from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from tests.engine.conftest import MICRO

RELEASED = ModelConfig.from_pretrained(Path(__file__).parents[1] / "fixtures" / "step-3.5-flash-config.json")


def limits(**options: object) -> CacheLimits:
    values: dict[str, object] = {
        "max_num_seqs": 1,
        "max_model_len": 262144,
        "max_batched_tokens": 512,
        "max_deferred_tokens": 1,
        "num_modules": 3,
    }
    return CacheLimits(**(values | options))  # type: ignore[arg-type]


def test_the_released_model_takes_the_bytes_of_its_specification() -> None:
    per_full, per_sliding = block_bytes(RELEASED, limits())
    # Section 2.5: 48 KiB per token in 12 full layers; (33 + 3) sliding layers of 4 KiB per position.
    assert per_full == 16 * 48 * 1024
    assert per_sliding == 16 * 36 * 4 * 1024
    assert 262144 // 16 * per_full == 12 << 30
    assert 512 // 16 * per_sliding == (66 + 6) << 20
    # Between two steps: the window, one block before it, one block that is cut, and what drafts may touch.
    held = sliding_blocks_per_sequence(RELEASED, limits()) * 16
    assert 512 <= held <= 512 + 3 * 16 + LOOKAHEAD_SLOTS
    assert block_bytes(RELEASED, limits(num_modules=0))[1] == 16 * 33 * 4 * 1024
    # int8: a byte per value and a float32 scale per head for each of key and value.
    assert block_bytes(RELEASED, limits(dtype=torch.int8))[0] == 16 * 12 * 2 * 8 * (128 + 4)


def test_the_plan_uses_the_budget_and_not_more() -> None:
    for budget in (2 << 30, 12 << 30, 20 << 30):
        full, sliding = plan_blocks(RELEASED, limits(), budget)
        per_full, per_sliding = block_bytes(RELEASED, limits())
        used = full * per_full + sliding * per_sliding
        assert budget - per_full < used <= budget
    with pytest.raises(ConfigError, match="kv_cache_bytes = 1000 is too small"):
        plan_blocks(RELEASED, limits(), 1000)


def test_a_sequence_holds_its_window_and_no_more() -> None:
    config = ModelConfig.from_pretrained(MICRO)
    own = limits(max_model_len=4096, block_size=4, max_batched_tokens=16)
    cache = KVCache(config, own, kv_cache_bytes=16 << 20)
    blocks = cache.open()
    most = sliding_blocks_per_sequence(config, own)
    for num_slots in range(1, 400):
        cache.grow(blocks, FULL, num_slots + LOOKAHEAD_SLOTS)
        cache.grow(blocks, SLIDING, num_slots + LOOKAHEAD_SLOTS)
        cache.trim(blocks, num_slots)
        assert len(blocks.sliding) <= most
        # Window 16: slots num_slots - 16 .. must exist, for a snapshot even those before the last boundary.
        boundary = num_slots // 4 * 4
        assert blocks.sliding_first * 4 <= max(0, boundary - 16)
        table = cache.tables[SLIDING][blocks.row]
        end = blocks.sliding_first + len(blocks.sliding)
        assert table[blocks.sliding_first : end].tolist() == blocks.sliding
        assert cache.used_bytes == sum(
            len(held) * size
            for held, size in zip((blocks.full, blocks.sliding), cache.block_bytes, strict=True)
        )
    cache.close(blocks)
    assert cache.used_bytes == 0


@pytest.mark.parametrize("max_deferred_tokens", [1, 16])
def test_a_stretch_takes_only_what_nobody_misses(max_deferred_tokens: int) -> None:
    config = ModelConfig.from_pretrained(MICRO)
    own = limits(
        max_model_len=100, block_size=4, max_batched_tokens=16, max_deferred_tokens=max_deferred_tokens
    )
    cache = KVCache(config, own, kv_cache_bytes=4 << 20)
    cache.evict = lambda group, count: pytest.fail("somebody's blocks were taken")
    blocks, others = cache.open(), cache.pools[FULL].allocate(cache.pools[FULL].num_free - 24)
    most, gained = sliding_blocks_per_sequence(config, own), []
    for num_slots in range(1, 90):
        cache.grow(blocks, FULL, num_slots)
        cache.grow(blocks, SLIDING, num_slots)
        before = cache.num_slots(blocks)
        cache.stretch(blocks, num_slots + 16, 3)
        gained.append(cache.num_slots(blocks) - before)
        assert gained[-1] == 0 or cache.pools[FULL].num_free >= 3
        assert len(blocks.sliding) <= most
        assert cache.num_slots(blocks) <= cache.tables[FULL].shape[1] * 4
        cache.trim(blocks, num_slots)
    assert any(gained[:40])
    # 24 blocks of 4 are there, 3 are left to others.
    assert not any(gained[84:])
    cache.pools[FULL].release(others)
    cache.close(blocks)
    assert cache.used_bytes == 0


def test_262144_tokens_take_the_memory_of_the_formula() -> None:
    """Prefill in chunks, then decode, by the cache alone; the tensors are mapped, their pages untouched."""
    config = replace(ModelConfig.from_pretrained(MICRO), max_position_embeddings=262144)
    own = limits(max_batched_tokens=2048)
    per_full, per_sliding = block_bytes(config, own)
    cache = KVCache(config, own)
    blocks = cache.open()
    cache.grow(blocks, FULL, 262144)
    windows = sliding_blocks_per_sequence(config, own)
    for num_slots in [*range(2048, 262144, 2048), *range(262100, 262144)]:
        cache.grow(blocks, SLIDING, num_slots + LOOKAHEAD_SLOTS)
        assert len(blocks.sliding) <= windows + 2048 // 16 + 1  # in a step: its own tokens too
        cache.trim(blocks, num_slots)
        assert len(blocks.sliding) <= windows
    # Micro: 3 full layers (one of them an MTP module) and 8 sliding, 2 heads of 32 in bf16.
    assert per_full == 16 * 3 * 2 * 2 * 32 * 2
    assert cache.used_bytes == 262144 // 16 * per_full + len(blocks.sliding) * per_sliding
    assert cache.capacity_tokens == 262144


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of resident pages")
def test_a_cache_takes_memory_when_it_is_written_and_not_before() -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    config = replace(ModelConfig.from_pretrained(MICRO), max_position_embeddings=262144)
    before = resident()
    cache = KVCache(config, limits(max_num_seqs=8), kv_cache_bytes=2 << 30)
    assert cache.total_bytes > 1 << 30
    assert resident() - before < 32 << 20
    for layer in cache.layers.values():
        assert layer.keys.data_ptr() % 64 == layer.values.data_ptr() % 64 == 0
        assert layer.keys.is_contiguous()
        assert not layer.keys[-1].any()
    cache.layers[0].keys[:1000] = 1
    assert resident() - before >= cache.layers[0].keys[:1000].nbytes


def test_more_than_the_machine_gives_is_refused_with_the_numbers() -> None:
    config = ModelConfig.from_pretrained(MICRO)
    with pytest.raises(ConfigError, match=r"does not give 8,388,6\d\d\.\d GiB for keys and values"):
        KVCache(config, limits(max_model_len=512), kv_cache_bytes=1 << 53)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 5, 16]),
    first_slot=st.integers(0, 3),
    block_size=st.sampled_from([1, 4, 16]),
    groups=st.integers(1, 3),
)
def test_paged_attention_equals_dense_attention(
    lengths: list[tuple[int, int]], window: int | None, first_slot: int, block_size: int, groups: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    kv_heads, dim, num_blocks = 2, 8, 64 * 3
    keys, values = torch.randn(2, num_blocks, block_size, kv_heads, dim, generator=generator)
    order = torch.randperm(num_blocks, generator=generator).int()
    context_lens = [max(total, new + first_slot) for total, new in lengths]
    cu_seqlens = [0]
    for _, new in lengths:
        cu_seqlens.append(cu_seqlens[-1] + new)
    tables = order.view(3, 64)[: len(lengths)]
    q = torch.randn(cu_seqlens[-1], kv_heads * groups, dim, generator=generator)
    layer = LayerCache(
        group=0, window=window, scale=dim**-0.5, first_slot=first_slot, keys=keys, values=values
    )
    slots = [
        int(tables[i, s // block_size]) * block_size + s % block_size
        for i, end in enumerate(context_lens)
        for s in range(end - cu_seqlens[i + 1] + cu_seqlens[i], end)
    ]
    k, v = torch.randn(2, cu_seqlens[-1], kv_heads, dim, generator=generator)
    batch = SimpleNamespace(
        slot_mapping=lambda group: torch.tensor(slots),
        block_tables=(tables,),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
    )
    out = PagedAttention(SimpleNamespace(layers={0: layer}), batch)(0, q, k, v)  # type: ignore[arg-type]
    assert all(torch.equal(keys.flatten(0, 1)[s], row) for s, row in zip(slots, k, strict=True))
    for i, end in enumerate(context_lens):
        for row in range(cu_seqlens[i], cu_seqlens[i + 1]):
            slot = end - cu_seqlens[i + 1] + row
            low = first_slot if window is None else max(first_slot, slot - window + 1)
            seen = [(int(tables[i, s // block_size]), s % block_size) for s in range(low, slot + 1)]
            for head in range(kv_heads * groups):
                k = torch.stack([keys[b, o, head // groups] for b, o in seen])
                v = torch.stack([values[b, o, head // groups] for b, o in seen])
                weights = (k @ q[row, head] / dim**0.5).softmax(0)
                torch.testing.assert_close(out[row, head], weights @ v, rtol=1e-5, atol=1e-5)
