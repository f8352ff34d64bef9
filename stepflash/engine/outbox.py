"""The way of outputs from the engine thread to the event loop whose streams wait for them.

All that is put in while a delivery is on its way goes with it, and deliveries are `INTERVAL_SECONDS` apart: a small
model that makes a thousand steps a second neither wakes the loop nor has its clients written to for each of them.
Where steps take longer, each is delivered at once; so is the first and the last that a stream gets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from stepflash.engine.request import Output

INTERVAL_SECONDS = 0.01

# What a stream receives: outputs, or why its request was refused.
Stream = asyncio.Queue[Output | BaseException]

_NO_DELIVERY, _SOON, _AT_ONCE = range(3)


class Outbox:
    """Belongs to one event loop; `put` is called on the engine thread, the rest happens in the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Stream, Output | BaseException]] = deque()
        self._asked = _NO_DELIVERY
        self._timer: asyncio.TimerHandle | None = None
        self._delivered_at = float("-inf")

    def put(self, stream: Stream, item: Output | BaseException) -> bool:
        """False if the loop is gone, and its requests with it."""
        # First of all: a delivery that has begun takes it along, or has forgotten by then that it was asked for.
        self._items.append((stream, item))
        wanted = _AT_ONCE if _is_urgent(item) else _SOON
        if self._asked >= wanted:
            return not self._loop.is_closed()
        self._asked = wanted
        try:
            self._loop.call_soon_threadsafe(self._set_out)
        except RuntimeError:
            return False
        return True

    def _set_out(self) -> None:
        wait_seconds = self._delivered_at + INTERVAL_SECONDS - self._loop.time()
        if self._asked == _AT_ONCE or wait_seconds <= 0:
            self._deliver()
        elif self._timer is None:
            self._timer = self._loop.call_later(wait_seconds, self._deliver)

    def _deliver(self) -> None:
        self._asked = _NO_DELIVERY
        self._delivered_at = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        by_stream: dict[Stream, list[Output | BaseException]] = {}
        while self._items:
            stream, item = self._items.popleft()
            by_stream.setdefault(stream, []).append(item)
        for stream, items in by_stream.items():
            for joined in items if len(items) == 1 else _joined(items):
                stream.put_nowait(joined)


def _is_urgent(item: Output | BaseException) -> bool:
    if isinstance(item, BaseException) or item.finish_reason is not None or item.stats is None:
        return True
    return item.stats.num_generated_tokens <= len(item.token_ids)


def _joined(items: Sequence[Output | BaseException]) -> Iterator[Output | BaseException]:
    """Outputs of one request as one; what went wrong stays apart from what went well before."""
    outputs = [item for item in items if isinstance(item, Output) and item.error is None]
    if outputs:
        yield replace(
            outputs[-1],
            token_ids=tuple(chain.from_iterable([output.token_ids for output in outputs])),
            logprobs=tuple(chain.from_iterable([output.logprobs for output in outputs])),
        )
    yield from (item for item in items if not isinstance(item, Output) or item.error is not None)
