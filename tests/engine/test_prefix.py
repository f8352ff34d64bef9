"""The prefix cache against a dictionary of all prefixes (brute force), and its promises about agents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.core import EngineCore
from stepflash.engine.kv_cache import FULL, SLIDING, CacheLimits, KVCache
from stepflash.engine.prefix import PrefixCache
from stepflash.model.config import ModelConfig
from tests.engine.conftest import FEW_TOKENS, MICRO, drive, request

CONFIG = ModelConfig.from_pretrained(MICRO)


def new_cache(kv_cache_bytes: int = 4 << 20) -> tuple[KVCache, PrefixCache]:
    limits = CacheLimits(
        block_size=4,
        max_num_seqs=2,
        max_model_len=64,
        max_batched_tokens=16,
        max_deferred_tokens=1,
        num_modules=3,
    )
    cache = KVCache(CONFIG, limits, kv_cache_bytes=kv_cache_bytes)
    return cache, PrefixCache(cache)


def remember(cache: KVCache, prefix: PrefixCache, token_ids: list[int], snapshots: set[int]) -> None:
    blocks = cache.open()
    cache.grow(blocks, FULL, len(token_ids))
    cache.grow(blocks, SLIDING, len(token_ids))
    for boundary in sorted(snapshots):
        node = prefix.insert(token_ids, blocks.full[: boundary // 4])
        kept = cache.sliding_before(blocks, boundary)
        assert kept is not None
        prefix.add_snapshot(node, *kept, (torch.zeros(1, 2),) * 3)
    cache.close(blocks)


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=40)


@settings(max_examples=100)
@given(st.lists(st.tuples(tokens, st.sets(st.integers(1, 9))), max_size=6), tokens)
def test_a_match_is_the_longest_remembered_prefix(
    work: list[tuple[list[int], set[int]]], query: list[int]
) -> None:
    cache, prefix = new_cache()
    known: set[tuple[int, ...]] = set()
    for token_ids, marks in work:
        snapshots = {4 * m for m in marks if 4 * m <= len(token_ids)}
        remember(cache, prefix, token_ids, snapshots)
        known |= {tuple(token_ids[:s]) for s in snapshots}
    peeked = prefix.peek(query)
    match = prefix.match(query)
    assert peeked.num_cached_tokens == match.num_tokens <= peeked.num_known_tokens
    best = max((n for n in range(len(query)) if tuple(query[:n]) in known), default=0)
    assert match.num_tokens == best
    assert len(match.full) == best // 4
    assert (match.snapshot is None) == (best == 0)
    for group in (FULL, SLIDING):
        cache.pools[group].check_integrity([], prefix.keepers(group))
    prefix.clear()
    assert cache.used_bytes == 0


def test_the_least_recently_used_goes_first_and_leaves_before_their_parents() -> None:
    cache, prefix = new_cache()
    a, b = [1] * 20, [2] * 20
    for token_ids in (a, b):
        remember(cache, prefix, token_ids, {8, 16})
    assert prefix.match(a).num_tokens == 16  # a is now the more recent one
    free = cache.pools[FULL].num_free
    held = cache.pools[FULL].allocate(free)
    prefix.evict(SLIDING, cache.pools[SLIDING].num_free + 1)
    assert prefix.match(b).num_tokens < 16
    assert prefix.match(a).num_tokens == 16
    cache.pools[FULL].release(held)


def test_a_miss_is_explained() -> None:
    cache, prefix = new_cache()
    assert prefix.match([5] * 20).miss == "nothing is cached yet"
    remember(cache, prefix, [1] * 32, {8, 32})
    assert prefix.match([*[1] * 33]).miss is None
    assert prefix.match([*[1] * 25, 7, *[1] * 9]).miss == (
        "diverged at token 25; the windows at tokens 9 to 24 are not kept"
    )
    assert prefix.match([1, 1, 7] * 3).miss == "diverged at token 2"
    # The window at 32 would leave nothing to compute.
    assert prefix.match([1] * 32).miss == "the windows at tokens 9 to 28 are not kept"
    assert prefix.match([1] * 50).miss == "no more than 32 tokens are cached"
    assert prefix.match([3, 7] * 9).miss == "diverged at token 0"
    remember(cache, prefix, [1] * 41 + [2] * 9, {8, 40, 48})
    assert prefix.match([1] * 41 + [3] * 9).miss == "diverged at token 41"
    assert prefix.match([1] * 41 + [2] * 7 + [5] * 9).miss == "no more than 48 tokens are cached"


@pytest.mark.parametrize("first", [0, 1, 2, 3, None])
def test_every_draft_depth_finds_what_any_other_left(
    new_core: Callable[..., EngineCore],
    golden: tuple[list[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    first: int | None,
) -> None:
    """The answer is the golden one. Drafts are as good as in an engine that has always drafted, unless nobody could
    want them."""
    prompt, expected = golden
    few = {"max_tokens": 60, "logit_bias": FEW_TOKENS}
    for depth in (0, 1, 3, None):
        core = new_core()
        monkeypatch.setattr(core.depth, "is_hopeless", lambda _: False)
        left = drive(core, request("a", prompt, max_tokens=40, draft_depth=first))["a"]
        assert left.token_ids == expected[:40]
        asked = prompt + left.token_ids
        done = drive(core, request("b", asked, max_tokens=30, draft_depth=depth))["b"]
        assert done.stats.num_cached_tokens == 192
        assert done.token_ids == expected[40:70]
        if depth:
            warm = drive(core, request("c", asked, draft_depth=depth, **few))["c"]
            cold = drive(new_core(), request("c", asked, draft_depth=depth, **few))["c"]
            assert warm.stats.num_cached_tokens >= 192
            assert warm.token_ids == cold.token_ids
            if first != 0:
                assert warm.stats.num_accepted_tokens == cold.stats.num_accepted_tokens
            assert sum(cold.stats.num_accepted_tokens) > 0


def test_an_agent_never_reads_its_history_again(new_core: Callable[..., EngineCore]) -> None:
    """Four interleaved conversations: each turn computes its new tokens and less than two blocks more."""
    core = new_core(max_model_len=2048, kv_cache_bytes=48 << 20, max_num_seqs=4)
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, 500, (count,), generator=generator).tolist()

    system = words(100)
    histories = [[*system, *words(5)] for _ in range(4)]
    for turn in range(8):
        for name, history in enumerate(histories):
            new = words(20)
            before = len(history)
            history += new
            asked = request(f"{name}-{turn}", history, max_tokens=11, cut_points=(100, before))
            done = drive(core, asked)[asked.request_id]
            if turn or name:
                # New in this turn: the question, and of the last answer what had not been computed.
                fresh = 20 + 5 if turn == 0 else 20 + 1
                assert done.stats.num_prefill_tokens <= fresh + 2 * 8, (turn, name, done.stats)
            history += done.token_ids
    assert core.stats().num_cached_tokens > 4 * 6 * 100
