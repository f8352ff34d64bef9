"""Counters of the server in Prometheus' text format.

Everything runs in the event loop's thread, so plain numbers do. Numbers that the engine reports through
`stats()` are shown beside ours as `stepflash_engine_*`.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from stepflash.assistant.stream import Usage

BUCKETS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of durations in fixed buckets."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_SECONDS) + 1)
        self._sum_seconds = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self._sum_seconds += seconds

    def lines(self, name: str) -> Iterator[str]:
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*BUCKETS_SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum_seconds:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What `/metrics` shows; `last_token_at` is on the monotonic clock."""

    def __init__(self) -> None:
        self.num_running = 0
        self.last_token_at = float("-inf")
        self.first_token_seconds = Histogram()
        self.answer_seconds = Histogram()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()

    def count_request(self, route: str, status: int) -> None:
        self._requests[route, status] += 1

    def count_usage(self, usage: Usage) -> None:
        self._tokens["prompt"] += usage.prompt_tokens
        self._tokens["cached"] += usage.cached_tokens
        self._tokens["generated"] += usage.completion_tokens
        self._tokens["drafted"] += usage.drafted_tokens
        self._tokens["accepted"] += usage.accepted_draft_tokens

    def render(self, engine_stats: Any) -> str:
        lines = ["# TYPE stepflash_requests_total counter"]
        for (route, status), count in sorted(self._requests.items()):
            lines.append(f'stepflash_requests_total{{route="{route}",status="{status}"}} {count}')
        lines.append("# TYPE stepflash_tokens_total counter")
        for kind in ("prompt", "cached", "generated", "drafted", "accepted"):
            lines.append(f'stepflash_tokens_total{{kind="{kind}"}} {self._tokens[kind]}')
        lines += ["# TYPE stepflash_running_answers gauge", f"stepflash_running_answers {self.num_running}"]
        lines += self.first_token_seconds.lines("stepflash_first_token_seconds")
        lines += self.answer_seconds.lines("stepflash_answer_seconds")
        for name, value in sorted(_numbers(engine_stats).items()):
            lines += [f"# TYPE stepflash_engine_{name} gauge", f"stepflash_engine_{name} {value}"]
        return "\n".join(lines) + "\n"


def _numbers(stats: Any) -> dict[str, float]:
    """The plain numbers of whatever an engine reports; sequences become one number per index."""
    if dataclasses.is_dataclass(stats) and not isinstance(stats, type):
        stats = dataclasses.asdict(stats)
    if not isinstance(stats, Mapping):
        return {}
    numbers: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, int | float):
            numbers[str(name)] = float(value)
        elif isinstance(value, list | tuple):
            numbers.update(
                {f"{name}_{i}": float(v) for i, v in enumerate(value) if isinstance(v, int | float)}
            )
    return numbers
