"""Outputs on their way to an event loop: nothing lost, in order, few deliveries, and none that waits for long."""

import asyncio
import threading
import time
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.outbox import INTERVAL_SECONDS, Outbox, Stream
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


@settings(max_examples=25, deadline=None)
@given(
    bursts=st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=60),
    pauses=st.lists(st.sampled_from([0, 0, 0, 0, 0.002]), min_size=60, max_size=60),
)
def test_two_streams_get_all_of_theirs_in_order(bursts: list[list[int]], pauses: list[float]) -> None:
    async def main() -> None:
        outbox = Outbox(asyncio.get_running_loop())
        streams: list[Stream] = [asyncio.Queue(), asyncio.Queue()]

        def produce() -> None:
            total = 0
            for burst, pause in zip(bursts, pauses, strict=False):
                total += len(burst)
                for name, stream in enumerate(streams):
                    assert outbox.put(stream, output(str(name), burst, total))
                time.sleep(pause)
            for name, stream in enumerate(streams):
                outbox.put(stream, output(str(name), [100], total + 1, "length"))

        thread = threading.Thread(target=produce)
        thread.start()
        for name, items in enumerate(await asyncio.gather(*map(drained, streams))):
            token_ids = [token_id for item in items for token_id in item.token_ids]
            assert token_ids == [*(token_id for burst in bursts for token_id in burst), 100]
            assert [token.token_id for item in items for token in item.logprobs] == token_ids
            assert {item.request_id for item in items} == {str(name)}
        thread.join()

    asyncio.run(main())


def test_the_first_and_the_last_go_at_once_and_what_is_between_together() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        outbox, stream = Outbox(loop), Stream()

        async def arrived(item: Output) -> list[Output | BaseException]:
            """What is there after two turns of the loop, without any time for a timer."""
            outbox.put(stream, item)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return [stream.get_nowait() for _ in range(stream.qsize())]

        first = output("a", [1], 1)
        assert await arrived(first) == [first]
        outbox._delivered_at = loop.time() + 60 - INTERVAL_SECONDS  # as if the interval were a minute
        for n in range(2, 6):
            assert await arrived(output("a", [n], n)) == []
        (last,) = await arrived(output("a", [6], 6, "stop"))
        assert isinstance(last, Output)
        assert (last.token_ids, last.finish_reason) == ((2, 3, 4, 5, 6), "stop")
        assert outbox._timer is None

    asyncio.run(main())


def test_an_error_stays_apart_from_the_tokens_before_it() -> None:
    async def main() -> None:
        outbox, stream = Outbox(asyncio.get_running_loop()), Stream()
        outbox.put(stream, output("a", [1], 1))
        outbox.put(stream, output("a", [2], 2))
        outbox.put(stream, Output(request_id="a", finish_reason="error", error="broken"))
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
    assert not outbox.put(stream, output("a", [1], 1))
    assert not outbox.put(stream, output("a", [2], 2))
