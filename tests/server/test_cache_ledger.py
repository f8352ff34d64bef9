"""The ledger of prompts against brute force, and each reason why less was reused."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.request import CacheLookup
from stepflash.server.cache_ledger import REASONS, CacheLedger, CacheReport, cache_headers, explain

BLOCK = 4
LONG = list(range(100))
tokens = st.lists(st.integers(0, 1), max_size=12)


def lookup(cached: int, known: int | None = None) -> CacheLookup:
    return CacheLookup(
        num_cached_tokens=cached,
        num_known_tokens=cached if known is None else known,
        block_size=BLOCK,
    )


def decode(token_ids: Any) -> str:
    return " ".join(str(token_id) for token_id in token_ids)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("ab"), tokens, tokens), max_size=8), tokens)
def test_the_nearest_is_the_longest_common_prefix(
    work: list[tuple[str, list[int], list[int]]], query: list[int]
) -> None:
    ledger = CacheLedger()
    for number, (client, prompt, answer) in enumerate(work):
        report = ledger.open(str(number), client, prompt, None)
        report.answer_ids += answer
        ledger.close(report)

    def common(other: list[int]) -> int:
        return next(
            (i for i in range(min(len(query), len(other))) if query[i] != other[i]),
            min(len(query), len(other)),
        )

    own = [
        (common(prompt + answer), number)
        for number, (client, prompt, answer) in enumerate(work)
        if client == "a"
    ]
    nearest = ledger.compare("q", "a", query, None).nearest
    if not own:
        assert nearest is None
        return
    assert nearest is not None
    most, newest = max(own)
    assert (nearest.num_shared_tokens, nearest.request_id) == (most, str(newest))
    assert list(nearest.next_ids) == (work[newest][1] + work[newest][2])[most:]


def test_it_holds_no_more_than_it_may() -> None:
    ledger = CacheLedger(max_tokens=50, max_prompts=4)
    for number in range(20):
        report = ledger.open(str(number), "a", [number] * 10, None)
        report.answer_ids += [number] * 5
        ledger.close(report)
        ledger.close(report)
        held = list(ledger.latest("a"))
        assert sum(len(report.history) for report in held) <= 50
        assert held[0].request_id == str(number)
    assert [report.request_id for report in ledger.latest("a")] == ["19", "18", "17"]
    # One prompt is kept however long it is: it is what was asked about last.
    ledger.open("long", "a", [1] * 1000, None)
    assert [report.request_id for report in ledger.latest("a")] == ["long"]


def second(
    earlier: list[int],
    prompt: list[int],
    found: CacheLookup | None,
    *,
    cached: int | None = None,
    is_running: bool = False,
) -> CacheReport:
    ledger = CacheLedger()
    first = ledger.open("first", "a", earlier, lookup(0))
    if not is_running:
        ledger.close(first)
    report = ledger.open("second", "a", prompt, found)
    if cached is not None:
        report.num_cached_tokens = cached
    return report


OTHER = [*LONG[:60], *[7] * 40]


@pytest.mark.parametrize(
    ("report", "kind", "header"),
    [
        (second(LONG, LONG, lookup(96)), "hit", None),
        (second(LONG, [*LONG, *[7] * 20], lookup(96)), "grown", "grown"),
        (second(LONG, OTHER, lookup(60)), "diverged", "diverged at token 60"),
        (second([5, *LONG], LONG, lookup(0)), "first", "first"),
        (second([5, *LONG], LONG, lookup(40)), "other_client", "other_client"),
        (second(LONG, [*LONG, 7], lookup(12, known=96)), "no_snapshot", "no_snapshot"),
        (second(LONG, [*LONG, 7], lookup(12)), "evicted", "evicted"),
        (second(LONG, [*LONG, 7], lookup(0), is_running=True), "not_yet", "not_yet"),
        (second(LONG, [*LONG, 7], None), "lost", "lost"),
        (second(LONG, LONG, None, cached=96), "hit", None),
    ],
)
def test_each_reason(report: CacheReport, kind: str, header: str | None) -> None:
    told = explain(report, decode)
    assert told["kind"] == kind
    assert told["reason"].startswith(REASONS[kind])
    assert told["computed_tokens"] == told["prompt_tokens"] - told["cached_tokens"]
    assert cache_headers([report]).get("x-stepflash-cache-miss") == header


def test_a_divergence_is_shown_from_both_sides() -> None:
    nearest = explain(second(LONG, OTHER, lookup(60)), decode)["nearest"]
    assert nearest["diverged_at_token"] == 60
    assert nearest["text_before"].endswith("58 59")
    assert nearest["text_now"].startswith("7 7")
    assert nearest["text_earlier"].startswith("60 61")
    assert not nearest["is_same_text"]


def test_both_reasons_are_told_the_dearer_one_first() -> None:
    told = explain(second(LONG, OTHER, lookup(8)), decode)
    assert told["kind"] == "evicted"
    assert told["reason"] == f"{REASONS['evicted']}; besides, {REASONS['diverged']}"
    assert explain(second(LONG, OTHER, lookup(40)), decode)["kind"] == "diverged"


def test_the_same_text_in_other_tokens_is_recognised() -> None:
    def spelled(token_ids: Any) -> str:
        return "".join(map(str, token_ids))

    told = explain(second([1, 2, 12, 3, *[9] * 30], [1, 2, 1, 2, 3, *[9] * 30], lookup(0)), spelled)
    assert told["nearest"]["diverged_at_token"] == 2
    assert told["nearest"]["is_same_text"] is True
    assert "in other tokens" in told["reason"]
    told = explain(second([1, 2, 12, 3, *[9] * 30], [1, 2, 1, 3, 3, *[9] * 30], lookup(0)), spelled)
    assert told["nearest"]["is_same_text"] is False
