"""The way of outputs from the engine thread to the event loop whose streams wait for them.

What is put in while a delivery is on its way goes with it, and deliveries are some milliseconds apart: a small model
that makes a thousand steps a second neither wakes the loop nor has its clients written to for each of them. With many
streams a delivery is work for the loop, and a small model loses the time: deliveries are then so far apart that they
take a fortieth of it, within limits that depend on how many steps go together: nobody reads along with a stream that
brings so much text in a tenth of a second. Where steps take longer, each is delivered at once; so is the first and
the last of a stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence

from stepflash.engine.request import Output

MIN_SECONDS, MAX_SECONDS = 0.01, 0.05  # between deliveries
MANY_STEPS, MANY_SECONDS = 16, 0.1  # so far apart may they be where so many steps go together
WORK_SHARE = 0.025

_NO_DELIVERY, _SOON, _AT_ONCE = range(3)


class Stream:
    """What one request receives: outputs, or why it was refused. One task waits for them."""

    def __init__(self) -> None:
        self._items: deque[Output | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Output | BaseException) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Output | BaseException:
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()


class Outbox:
    """Belongs to one event loop; `put` is called on the engine thread, the rest happens in the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._batches: deque[tuple[Sequence[tuple[Stream, Output | BaseException]], bool]] = deque()
        self._asked = _NO_DELIVERY
        self._held: dict[Stream, list[Output | BaseException]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._delivered_at = float("-inf")
        self._interval = MIN_SECONDS

    def put(self, batch: Sequence[tuple[Stream, Output | BaseException]]) -> bool:
        """What a step brought. False if the loop is gone, and its requests with it."""
        is_urgent = any(_is_urgent(item) for _, item in batch)
        # First of all: a delivery that has begun takes it along, or has forgotten by then that it was asked for.
        self._batches.append((batch, is_urgent))
        wanted = _AT_ONCE if is_urgent else _SOON
        if self._asked >= wanted:
            return not self._loop.is_closed()
        self._asked = wanted
        try:
            self._loop.call_soon_threadsafe(self._set_out)
        except RuntimeError:
            return False
        return True

    def _set_out(self) -> None:
        now = self._loop.time()
        due = self._delivered_at + self._interval
        if now >= due:
            self._deliver()
            return
        # While the timer runs nothing else needs to wake the loop.
        self._asked = _NO_DELIVERY if self._timer is None else _SOON
        for stream in self._take():
            _hand_over(stream, self._held.pop(stream))
        if self._held and self._timer is None:
            self._timer = self._loop.call_later(due - now, self._deliver)
            self._asked = _SOON

    def _deliver(self) -> None:
        self._asked = _NO_DELIVERY
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._take()
        held, self._held = self._held, {}
        if not held:
            return
        self._delivered_at = self._loop.time()
        for stream, items in held.items():
            _hand_over(stream, items)
        # Behind all tasks that have been woken.
        self._loop.call_soon(self._note_work, max(map(len, held.values())))

    def _take(self) -> set[Stream]:
        """Sort what was put in by streams; those for which something is urgent."""
        urgent = set()
        while self._batches:
            batch, is_urgent = self._batches.popleft()
            for stream, item in batch:
                self._held.setdefault(stream, []).append(item)
                if is_urgent and _is_urgent(item):
                    urgent.add(stream)
        return urgent

    def _note_work(self, num_steps: int) -> None:
        """After a delivery, of so many steps for one stream at most."""
        now = self._loop.time()
        seconds = (now - self._delivered_at) / WORK_SHARE
        longest = MANY_SECONDS if num_steps >= MANY_STEPS else MAX_SECONDS
        # The mean, because anything may have come between.
        self._interval = min(longest, max(MIN_SECONDS, (self._interval + seconds) / 2))
        if num_steps > 1 and self._timer is None:
            # There will be something to deliver by then; the engine thread need not wake the loop for it.
            self._timer = self._loop.call_later(self._delivered_at + self._interval - now, self._deliver)
            self._asked = _SOON


def _is_urgent(item: Output | BaseException) -> bool:
    if isinstance(item, BaseException) or item.finish_reason is not None or item.stats is None:
        return True
    return item.stats.num_generated_tokens <= len(item.token_ids)


def _hand_over(stream: Stream, items: Sequence[Output | BaseException]) -> None:
    for item in items if len(items) == 1 else _joined(items):
        stream.put(item)


def _joined(items: Sequence[Output | BaseException]) -> Iterator[Output | BaseException]:
    """Outputs of one request as one; what went wrong stays apart from what went well before."""
    outputs = [item for item in items if isinstance(item, Output) and item.error is None]
    if outputs:
        last = outputs[-1]
        yield Output(
            request_id=last.request_id,
            token_ids=tuple([token_id for output in outputs for token_id in output.token_ids]),
            logprobs=tuple([logprob for output in outputs for logprob in output.logprobs]),
            prompt_logprobs=outputs[0].prompt_logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            stats=last.stats,
        )
    if len(outputs) < len(items):
        yield from (item for item in items if not isinstance(item, Output) or item.error is not None)
