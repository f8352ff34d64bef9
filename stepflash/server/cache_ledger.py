"""Why a prompt was, or was not, found in the prefix cache: what `/cache/explain` and the reply's headers tell.

The engine knows how much it reused. The ledger remembers the prompts and answers of late, by client, and so knows
what could have been reused: it compares a prompt with all of them and keeps where the nearest one goes another way.
The two together say whether the client changed something or the cache lost something. It holds token ids only, for
a bounded number of tokens, and compares and shows a client its own requests, never those of another key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepflash.engine.request import CacheLookup

MAX_TOKENS = 4_000_000
MAX_PROMPTS = 512
BLOCK_SIZE = 16  # assumed of an engine that does not tell
SHOWN_TOKENS = 24  # of text on each side of a divergence
FEW_TOKENS = 256  # compared before the rest is

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The earlier prompt that has most in common with one: `num_shared_tokens`, and how it went on there."""

    request_id: str
    num_shared_tokens: int
    num_tokens: int
    next_ids: tuple[int, ...]
    is_running: bool


@dataclass(slots=True, kw_only=True, eq=False)
class CacheReport:
    """One prompt. `num_cached_tokens` is the lookup's guess until the engine has started the request."""

    request_id: str
    client: str
    prompt: Tokens
    lookup: CacheLookup | None
    nearest: Nearest | None
    num_cached_tokens: int
    answer_ids: list[int] = field(default_factory=list)
    is_running: bool = True

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def history(self) -> Tokens:
        """Prompt and answer."""
        return np.concatenate([self.prompt, np.array(self.answer_ids, dtype=np.int32)])

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.answer_ids)

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """A part of the history, shorter where that ends."""
        count = len(self.prompt)
        answer = self.answer_ids[max(0, begin - count) : max(0, end - count)]
        return (*self.prompt[begin:end].tolist(), *answer)

    def token_at(self, index: int) -> int | None:
        """Of the history; None behind its end."""
        if index < len(self.prompt):
            return int(self.prompt[index])
        index -= len(self.prompt)
        return self.answer_ids[index] if index < len(self.answer_ids) else None

    @property
    def kinds(self) -> list[str]:
        """Why no more was reused, the reason that cost most first; keys of `REASONS`."""
        block_size = self.lookup.block_size if self.lookup else BLOCK_SIZE
        if self.num_prompt_tokens - self.num_cached_tokens <= block_size:
            return ["hit"]
        if self.nearest is None or self.nearest.num_shared_tokens == 0:
            return ["other_client" if self.num_cached_tokens else "first"]
        shared = self.nearest.num_shared_tokens
        by_client = "grown" if shared == self.nearest.num_tokens else "diverged"
        costs = {by_client: self.num_prompt_tokens - shared}
        if shared - self.num_cached_tokens > block_size:
            costs[self._loss(self.nearest, block_size)] = shared - self.num_cached_tokens
        return sorted((kind for kind in costs if costs[kind]), key=lambda kind: -costs[kind])

    def _loss(self, nearest: Nearest, block_size: int) -> str:
        """Why the cache does not have all that it saw."""
        if nearest.is_running:
            return "not_yet"
        if self.lookup is None:
            return "lost"
        if nearest.num_shared_tokens - self.lookup.num_known_tokens <= block_size:
            return "no_snapshot"
        return "evicted"


REASONS = {
    "hit": "all but the last block of the prompt came from the cache",
    "first": "nothing that begins like this was sent before",
    "other_client": "another client sent the same beginning; no request of this client did",
    "grown": "the prompt begins with an earlier request, whole, and its answer; the rest is new",
    "diverged": "the prompt goes another way than the nearest earlier request",
    "not_yet": "the nearest earlier request is still being computed, so its end is not in the cache yet",
    "no_snapshot": "its keys and values are kept, but not the sliding windows at this place: the computation starts "
    "further in front, where they are",
    "evicted": "it was in the cache and has been evicted; a larger --kv-cache-gb keeps more",
    "lost": "the engine behind this server does not have it any more, or never had",
}


class CacheLedger:
    """The prompts of late, oldest first."""

    def __init__(self, max_tokens: int = MAX_TOKENS, max_prompts: int = MAX_PROMPTS) -> None:
        self._reports: OrderedDict[CacheReport, int] = OrderedDict()
        self._num_tokens = 0
        self._limits = max_tokens, max_prompts

    def compare(
        self, request_id: str, client: str, token_ids: Sequence[int], lookup: CacheLookup | None
    ) -> CacheReport:
        """A report on a prompt, which is not remembered."""
        prompt = np.array(token_ids, dtype=np.int32)
        return CacheReport(
            request_id=request_id,
            client=client,
            prompt=prompt,
            lookup=lookup,
            nearest=_nearest(prompt, self._of(client)),
            num_cached_tokens=lookup.num_cached_tokens if lookup else 0,
        )

    def open(
        self, request_id: str, client: str, token_ids: Sequence[int], lookup: CacheLookup | None
    ) -> CacheReport:
        """A report on a prompt that is about to run; `close` it when its answer has ended."""
        report = self.compare(request_id, client, token_ids, lookup)
        self._keep(report, report.num_prompt_tokens)
        return report

    def close(self, report: CacheReport) -> None:
        report.is_running = False
        if report in self._reports:
            self._num_tokens -= self._reports[report]
            self._keep(report, report.num_tokens)

    def latest(self, client: str, request_id: str | None = None) -> Iterator[CacheReport]:
        """The reports of a client, newest first."""
        of_client = self._of(client)
        return (report for report in of_client if request_id in (None, report.request_id))

    def _of(self, client: str) -> Iterator[CacheReport]:
        return (report for report in reversed(self._reports) if report.client == client)

    def _keep(self, report: CacheReport, num_tokens: int) -> None:
        self._reports[report] = num_tokens
        self._num_tokens += num_tokens
        max_tokens, max_prompts = self._limits
        while len(self._reports) > 1 and (self._num_tokens > max_tokens or len(self._reports) > max_prompts):
            self._num_tokens -= self._reports.popitem(last=False)[1]


def explain(report: CacheReport, decode: Callable[[Iterable[int]], str]) -> dict[str, Any]:
    """A report in JSON, with the text around the place where the prompt leaves the nearest earlier one."""
    kinds, nearest = report.kinds, report.nearest
    told: dict[str, Any] = {
        "request_id": report.request_id,
        "prompt_tokens": report.num_prompt_tokens,
        "cached_tokens": report.num_cached_tokens,
        "computed_tokens": report.num_prompt_tokens - report.num_cached_tokens,
        "kind": kinds[0],
        "reason": "; besides, ".join(REASONS[kind] for kind in kinds),
        "nearest": None,
    }
    if nearest is None:
        return told
    at = nearest.num_shared_tokens
    diverges = at < min(report.num_prompt_tokens, nearest.num_tokens)
    told["nearest"] = {
        "request_id": nearest.request_id,
        "shared_tokens": at,
        "tokens": nearest.num_tokens,
        "diverged_at_token": at if diverges else None,
    }
    if diverges:
        before, here = report.prompt[max(0, at - SHOWN_TOKENS) : at], report.prompt[at : at + SHOWN_TOKENS]
        now, earlier = decode(here.tolist()), decode(nearest.next_ids)
        same = now.startswith(earlier) or earlier.startswith(now)
        told["nearest"] |= {
            "text_before": decode(before.tolist()),
            "text_now": now,
            "text_earlier": earlier,
            "is_same_text": same,
        }
        if same:
            told["reason"] += (
                "; the text is the same there, and the model had written it in other tokens than the tokenizer would"
            )
    return told


def cache_headers(reports: Sequence[CacheReport]) -> dict[str, str]:
    """What the reply's headers say of the prompts of a request."""
    if not reports:
        return {}
    cached = sum(report.num_cached_tokens for report in reports)
    told = {
        "x-stepflash-prompt-tokens": str(sum(report.num_prompt_tokens for report in reports)),
        "x-stepflash-cached-tokens": str(cached),
    }
    worst = min(reports, key=lambda report: report.num_cached_tokens)
    kind = worst.kinds[0]
    if kind != "hit":
        at = f" at token {worst.nearest.num_shared_tokens}" if worst.nearest and kind == "diverged" else ""
        told["x-stepflash-cache-miss"] = kind + at
    return told


def _nearest(prompt: Tokens, reports: Iterable[CacheReport]) -> Nearest | None:
    """Of the prompts that have most in common with one, the newest."""
    best: CacheReport | None = None
    most = -1
    for report in reports:
        if most == len(prompt):
            break
        # Whoever has more in common has the token behind it in common; one look settles most of them.
        if most >= 0 and report.token_at(most) != prompt[most]:
            continue
        num_shared = _num_shared(prompt, report)
        if num_shared > most:
            best, most = report, num_shared
    if best is None:
        return None
    return Nearest(
        request_id=best.request_id,
        num_shared_tokens=most,
        num_tokens=best.num_tokens,
        next_ids=best.tokens(most, most + SHOWN_TOKENS),
        is_running=best.is_running,
    )


def _num_shared(prompt: Tokens, report: CacheReport) -> int:
    if len(prompt) and len(report.prompt) and prompt[0] != report.prompt[0]:
        return 0
    few = _common(prompt[:FEW_TOKENS], report.prompt[:FEW_TOKENS])
    if few == len(prompt) or few < min(FEW_TOKENS, len(report.prompt)):
        return few
    return _common(prompt, report.history)


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    return int(different.argmax()) if different.any() else size
