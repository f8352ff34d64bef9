"""Outputs on their way to an event loop: nothing lost, in order, few deliveries, and none that waits for long."""

import asyncio
import itertools
import threading
import time
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.outbox import MANY_SECONDS, MANY_STEPS, MAX_SECONDS, MIN_SECONDS, Outbox, Stream
from stepflash.engine.request import FinishReason, Output, RequestStats, TokenLogprob


def output(name: str, token_ids: Sequence[int], so_far: int, reason: FinishReason | None = None) -> Output:
    return Output(
        request_id=name,
        token_ids=tuple(token_ids),
        logprobs=tuple(TokenLogprob(token_id=i, logprob=-float(i)) for i in token_ids),
        finish_reason=reason,
        stats=RequestStats(num_generated_tokens=so_far),
    )


async def drained(stream: Stream) -> list[Output]:
    items = []
    while True:
        item = await asyncio.wait_for(stream.get(), 20)
        assert isinstance(item, Output)
        items.append(item)
        if item.finish_reason is not None:
            return items


@settings(max_examples=25)
@given(
    bursts=st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=60),
    pauses=st.lists(st.sampled_from([0, 0, 0, 0, 0.002]), min_size=60, max_size=60),
)
def test_two_streams_get_all_of_theirs_in_order(bursts: list[list[int]], pauses: list[float]) -> None:
    async def main() -> None:
        outbox = Outbox(asyncio.get_running_loop())
        streams = [Stream(), Stream()]

        def produce() -> None:
            total = 0
            for burst, pause in zip(bursts, pauses, strict=False):
                total += len(burst)
                for name, stream in enumerate(streams):
                    assert outbox.put([(stream, output(str(name), burst, total))])
                time.sleep(pause)
            for name, stream in enumerate(streams):
                outbox.put([(stream, output(str(name), [100], total + 1, "length"))])

        thread = threading.Thread(target=produce)
        thread.start()
        for name, items in enumerate(await asyncio.gather(*map(drained, streams))):
            token_ids = [token_id for item in items for token_id in item.token_ids]
            assert token_ids == [*(token_id for burst in bursts for token_id in burst), 100]
            assert [token.token_id for item in items for token in item.logprobs] == token_ids
            assert {item.request_id for item in items} == {str(name)}
        thread.join()

    asyncio.run(main())


def arrived(stream: Stream) -> list[Output]:
    """What is there now."""
    items = [item for item in stream._items if isinstance(item, Output)]
    stream._items.clear()
    return items


async def two_turns() -> None:
    """Of the loop, without any time for a timer."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def test_the_first_and_the_last_go_at_once_and_what_is_between_together() -> None:
    async def main() -> None:
        outbox, stream, other = Outbox(asyncio.get_running_loop()), Stream(), Stream()
        first = output("a", [1], 1)
        outbox.put([(stream, first)])
        await two_turns()
        assert arrived(stream) == [first]
        outbox._interval = 60.0  # as if there were much work
        for n in range(2, 6):
            outbox.put([(stream, output("a", [n], n))])
            outbox.put([(other, output("b", [n], n))])
            await two_turns()
            assert arrived(stream) == arrived(other) == []
        outbox.put([(stream, output("a", [6], 6, "stop"))])
        await two_turns()
        (last,) = arrived(stream)
        assert (last.token_ids, last.finish_reason) == ((2, 3, 4, 5, 6), "stop")
        # What is not urgent waits for its time.
        assert arrived(other) == []
        assert outbox._timer is not None
        outbox._deliver()
        (held,) = arrived(other)
        assert held.token_ids == (2, 3, 4, 5)

    asyncio.run(main())


def test_outputs_that_come_slowly_never_wait() -> None:
    async def main() -> None:
        outbox, stream = Outbox(asyncio.get_running_loop()), Stream()
        for n in range(1, 5):
            outbox.put([(stream, output("a", [n], n))])
            await two_turns()
            assert [item.token_ids for item in arrived(stream)] == [(n,)]
            await asyncio.sleep(2 * MIN_SECONDS)
            assert outbox._timer is None

    asyncio.run(main())


def test_while_outputs_come_quickly_only_a_timer_wakes_the_loop() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        outbox, stream = Outbox(loop), Stream()
        outbox.put([(stream, output("a", [1], 1))])
        await two_turns()
        for n in (2, 3):
            outbox.put([(stream, output("a", [n], n))])
        await asyncio.sleep(MIN_SECONDS * 1.5)
        assert [item.token_ids for item in arrived(stream)] == [(1,), (2, 3)]
        # The next delivery has its time, so nothing is asked of the loop.
        assert outbox._timer is not None
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = None  # type: ignore[method-assign, assignment]
        outbox.put([(stream, output("a", [4], 4))])
        loop.call_soon_threadsafe = call  # type: ignore[method-assign]
        item = await asyncio.wait_for(stream.get(), 20)
        assert isinstance(item, Output)
        assert item.token_ids == (4,)
        # With nothing to deliver it ends.
        await asyncio.sleep(3 * MIN_SECONDS)
        assert outbox._timer is None
        outbox.put([(stream, output("a", [5], 5))])
        await two_turns()
        assert [item.token_ids for item in arrived(stream)] == [(5,)]

    asyncio.run(main())


def test_the_more_work_a_delivery_is_the_rarer_they_are() -> None:
    async def main() -> None:
        outbox, stream = Outbox(asyncio.get_running_loop()), Stream()

        async def work() -> None:
            while True:
                await stream.get()
                time.sleep(0.02)

        task = asyncio.create_task(work())
        for n in range(1, 6):
            outbox.put([(stream, output("a", [n], n))])
            await asyncio.sleep(0.08)
        assert outbox._interval == MAX_SECONDS
        task.cancel()
        for n in range(6, 16):
            outbox.put([(stream, output("a", [n], n))])
            await asyncio.sleep(0.08)
        assert outbox._interval < MAX_SECONDS

    asyncio.run(main())


def test_where_many_steps_go_together_they_may_be_rarer_still() -> None:
    async def main() -> None:
        outbox, stream = Outbox(asyncio.get_running_loop()), Stream()
        token_ids: list[int] = []

        async def work() -> None:
            while True:
                item = await stream.get()
                assert isinstance(item, Output)
                token_ids.extend(item.token_ids)
                time.sleep(0.02)

        task = asyncio.create_task(work())
        steps = iter(range(1, 1000))
        for num_steps, longest in ((MANY_STEPS, MANY_SECONDS), (MANY_STEPS // 2, MAX_SECONDS)):
            for _ in range(4):
                for n in itertools.islice(steps, num_steps):
                    outbox.put([(stream, output("a", [n], n))])
                await asyncio.sleep(2 * MANY_SECONDS)
            assert outbox._interval == longest
        assert token_ids == list(range(1, next(steps)))
        task.cancel()

    asyncio.run(main())


def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    async def main() -> None:
        stream = Stream()
        reader = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        stream.put(output("a", [1], 1))
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        item = await asyncio.wait_for(stream.get(), 20)
        assert isinstance(item, Output)
        assert item.token_ids == (1,)

    asyncio.run(main())


def test_an_error_stays_apart_from_the_tokens_before_it() -> None:
    async def main() -> None:
        outbox, stream = Outbox(asyncio.get_running_loop()), Stream()
        outbox.put([(stream, output("a", [1], 1))])
        outbox.put([(stream, output("a", [2], 2))])
        outbox.put([(stream, Output(request_id="a", finish_reason="error", error="broken"))])
        first, second = await stream.get(), await stream.get()
        assert isinstance(first, Output)
        assert isinstance(second, Output)
        assert first.token_ids == (1, 2)
        assert first.error is None
        assert (second.token_ids, second.error) == ((), "broken")

    asyncio.run(main())


def test_a_loop_that_is_gone_is_noticed() -> None:
    async def make() -> tuple[Outbox, Stream]:
        return Outbox(asyncio.get_running_loop()), Stream()

    outbox, stream = asyncio.run(make())
    assert not outbox.put([(stream, output("a", [1], 1))])
    assert not outbox.put([(stream, output("a", [2], 2))])
