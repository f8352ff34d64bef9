"""What `/metrics` shows, in Prometheus' text format.

What clients see is counted here, from closed records and from the steps of running answers. What the engine
reports through `stats()` is shown beside it as `stepflash_engine_*`, read at the moment of asking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepflash.server.request_records import RequestRecord

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
TOKEN_KINDS = ("prompt", "cached", "generated", "reasoning", "drafted", "accepted")

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Counters, gauges and histograms of one application. `engine_stats` and `engine_restarts` are asked at every
    scrape."""

    def __init__(
        self, engine_stats: Callable[[], Any], engine_restarts: Callable[[], int] = lambda: 0
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "stepflash_requests",
            "HTTP requests by route and status (499: the client left)",
            ("route", "status"),
            registry=registry,
        )
        self._answers = Counter(
            "stepflash_answers", "answers by how they ended", ("finish_reason",), registry=registry
        )
        tokens = Counter("stepflash_tokens", "tokens of ended answers", ("kind",), registry=registry)
        self._tokens = {kind: tokens.labels(kind) for kind in TOKEN_KINDS}
        self.running_answers = Gauge(
            "stepflash_running_answers", "answers that run or wait", registry=registry
        )
        self._queue_seconds = Histogram(
            "stepflash_queue_seconds", "from submission to the first step", buckets=SECONDS, registry=registry
        )
        self._first_token_seconds = Histogram(
            "stepflash_first_token_seconds",
            "from submission to the first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "stepflash_inter_token_seconds",
            "between tokens after the first; a step's time is shared by its tokens",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self._answer_seconds = Histogram(
            "stepflash_answer_seconds", "from submission to the end", buckets=SECONDS, registry=registry
        )
        Gauge(
            "stepflash_engine_restarts", "times that the engine had to be replaced", registry=registry
        ).set_function(engine_restarts)
        registry.register(_EngineStats(engine_stats))

    def count(self, record: RequestRecord) -> None:
        """A closed request."""
        self._requests.labels(record.route, str(record.status)).inc()
        for answer in record.answers:
            self._answers.labels(answer.finish_reason).inc()
            self._answer_seconds.observe(answer.seconds)
            if answer.queue_seconds is not None:
                self._queue_seconds.observe(answer.queue_seconds)
            if answer.first_token_seconds is not None:
                self._first_token_seconds.observe(answer.first_token_seconds)
            usage = answer.usage
            amounts = (
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                usage.reasoning_tokens,
                usage.drafted_tokens,
                usage.accepted_draft_tokens,
            )
            for kind, amount in zip(TOKEN_KINDS, amounts, strict=True):
                self._tokens[kind].inc(amount)

    def render(self) -> str:
        return generate_latest(self._registry).decode()


class _EngineStats(Collector):
    """The plain numbers of whatever an engine reports; entry i of a tuple is that of draft position i + 1."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if dataclasses.is_dataclass(stats) and not isinstance(stats, type):
            stats = dataclasses.asdict(stats)
        if not isinstance(stats, Mapping):
            return
        for name, value in sorted(stats.items()):
            text = f"{name} of the engine; totals are since it started"
            if isinstance(value, int | float):
                yield GaugeMetricFamily(f"stepflash_engine_{name}", text, value=float(value))
            elif isinstance(value, list | tuple):
                family = GaugeMetricFamily(f"stepflash_engine_{name}", text, labels=("position",))
                for position, number in enumerate(value, 1):
                    family.add_metric((str(position),), float(number))
                yield family
