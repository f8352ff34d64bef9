"""PackedAttention against dense masked attention (brute force, property)."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.model.attention import PackedAttention
from stepflash.model.config import LayerConfig, RopeConfig


def layer(window: int | None) -> LayerConfig:
    return LayerConfig(
        window=window,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        rope=RopeConfig(theta=1e4, rotary_dim=8),
        is_moe=False,
    )


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 2**20),
)
def test_documents_see_only_their_own_past(lengths: list[int], window: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q = torch.randn(total, 6, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(total, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    ours = PackedAttention([layer(window)], cu_seqlens, "cpu")(0, q, k, v)

    for start, end in itertools.pairwise(cu_seqlens):
        for position in range(start, end):
            first = start if window is None else max(start, position - window + 1)
            for head in range(6):
                keys, values = k[first : position + 1, head // 3], v[first : position + 1, head // 3]
                weights = (keys @ q[position, head] * 8**-0.5).softmax(0)
                assert torch.allclose(ours[position, head], weights @ values, atol=1e-5)
