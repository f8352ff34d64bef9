"""The engine thread over asyncio: same tokens as the core, aborts, refusals, survival."""

from __future__ import annotations

import asyncio
import ctypes
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from stepflash.engine.core import EngineCore
from stepflash.engine.engine import Engine
from stepflash.engine.request import Output, Request
from stepflash.errors import EngineError, PromptTooLong
from tests.engine.conftest import drive, request

NewCore = Callable[..., EngineCore]


async def read(engine: Engine, asked: Request) -> list[Output]:
    return [output async for output in engine.submit(asked)]


async def until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 20
    while engine.stats().num_running or engine.stats().num_waiting:
        assert time.monotonic() < deadline, "the engine is still busy"
        await asyncio.sleep(0.005)


def test_concurrent_streams_equal_the_core(new_core: NewCore, golden: tuple[list[int], list[int]]) -> None:
    prompt, expected = golden
    others = [request(f"r{i}", prompt[i : i + 30], max_tokens=15, temperature=1.0, seed=i) for i in range(4)]
    alone = drive(new_core(), *others)

    async def main() -> None:
        with Engine(new_core()) as engine:
            asked = [request("a", prompt, max_tokens=30), *others]
            streams = await asyncio.gather(*(read(engine, r) for r in asked))
            tokens = {s[0].request_id: [t for o in s for t in o.token_ids] for s in streams}
            assert tokens.pop("a") == expected[:30]
            assert tokens == {name: entry.token_ids for name, entry in alone.items()}
            assert all(sum(o.finish_reason is not None for o in s) == 1 for s in streams)
            assert engine.stats().num_finished == 5
            assert engine.call(lambda core: core.check_integrity()).result(20) is None

    asyncio.run(main())


def test_leaving_a_stream_aborts_its_request(new_core: NewCore) -> None:
    async def main() -> None:
        with Engine(new_core()) as engine:
            stream = engine.submit(request("left", [5] * 10, max_tokens=400))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            task = asyncio.create_task(read(engine, request("cancelled", [6] * 10, max_tokens=400)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            aborted = asyncio.create_task(read(engine, request("aborted", [7] * 10, max_tokens=400)))
            await asyncio.sleep(0.05)
            engine.abort("aborted")
            engine.abort("nobody")
            assert (await aborted)[-1].finish_reason == "abort"
            await until_idle(engine)
            assert engine.stats().kv_used_bytes == engine.stats().kv_cached_bytes
            engine.call(lambda core: core.check_integrity()).result(20)

    asyncio.run(main())


def test_refusals_reach_the_caller_before_anything_runs(new_core: NewCore) -> None:
    async def main() -> None:
        engine = Engine(new_core(max_model_len=100))
        with pytest.raises(PromptTooLong):
            engine.submit(request("long", [5] * 100))
        running = asyncio.create_task(read(engine, request("same", [5] * 10, max_tokens=80)))
        await asyncio.sleep(0.02)
        with pytest.raises(Exception, match="already running"):
            await read(engine, request("same", [5] * 10))
        engine.close()
        assert (await running)[-1].finish_reason in ("error", "length")
        with pytest.raises(EngineError, match="closed"):
            engine.submit(request("after", [5]))

    asyncio.run(main())


def test_the_thread_survives_a_failure_of_the_scheduler(
    new_core: NewCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = new_core()
    schedule, fail = core.scheduler.schedule, [True]

    def sometimes(now: float) -> Any:
        if fail.pop() if fail else False:
            raise RuntimeError("scheduler bug")
        return schedule(now)

    monkeypatch.setattr(core.scheduler, "schedule", sometimes)

    async def main() -> None:
        with Engine(core) as engine:
            outputs = await read(engine, request("first", [5] * 10, max_tokens=5))
            assert outputs[-1].error == "RuntimeError: scheduler bug"
            outputs = await read(engine, request("second", [5] * 10, max_tokens=5))
            assert outputs[-1].finish_reason == "length"

    asyncio.run(main())


@pytest.mark.parametrize("where", ["in a step", "asynchronously", "with a leak"])
def test_a_dead_thread_is_replaced(
    new_core: NewCore, golden: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Who ran gets an error, who comes later gets the tokens of an engine that never failed."""
    prompt, expected = golden
    core = new_core()
    step = core.step
    fuse = [5]

    def broken() -> list[Output]:
        fuse[0] -= 1
        if fuse[0] > 0:
            return step()
        if where == "asynchronously":
            ident = ctypes.c_ulong(threading.get_ident())
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
            return step()
        if where == "with a leak":
            core.cache.pools[0].allocate(1)  # a block that nobody will ever give back
            raise RuntimeError("bug")
        raise SystemExit("ended")

    monkeypatch.setattr(core, "step", broken)

    async def main() -> None:
        with Engine(core) as engine:
            asked = [request(f"r{i}", prompt[i:], max_tokens=200) for i in range(3)]
            streams = await asyncio.wait_for(asyncio.gather(*(read(engine, r) for r in asked)), 30)
            for outputs in streams:
                assert outputs[-1].finish_reason == "error"
                assert outputs[-1].error
            later = await asyncio.wait_for(read(engine, request("later", prompt, max_tokens=30)), 30)
            assert [token for output in later for token in output.token_ids] == expected[:30]
            assert engine.num_restarts == 1
            engine.call(lambda core: core.check_integrity()).result(20)
        assert not any(thread.name == "stepflash-engine" for thread in threading.enumerate())

    asyncio.run(main())


def test_an_engine_that_cannot_be_restarted_says_so(
    new_core: NewCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = new_core()

    def out_of_memory() -> EngineCore:
        raise MemoryError("no room for the cache")

    def die() -> list[Output]:
        raise SystemExit

    monkeypatch.setattr(core, "step", die)
    monkeypatch.setattr(core, "rebuilt", out_of_memory)

    def is_refusing(engine: Engine) -> bool:
        try:
            engine.submit(request("b", [5] * 10))
        except EngineError as error:
            return "closed" in str(error)
        return False

    async def main() -> None:
        with Engine(core) as engine:
            outputs = await asyncio.wait_for(read(engine, request("a", [5] * 10, max_tokens=5)), 30)
            assert "restarted" in (outputs[-1].error or "")
            deadline = time.monotonic() + 20
            while not is_refusing(engine):
                assert time.monotonic() < deadline, "the engine still takes requests"
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_dead_event_loop_does_not_hurt_others(new_core: NewCore) -> None:
    with Engine(new_core()) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.submit(request("orphan", [5] * 10, max_tokens=400))
        loop.run_until_complete(anext(stream))
        loop.close()
        outputs = asyncio.run(read(engine, request("alive", [6] * 10, max_tokens=5)))
        assert outputs[-1].finish_reason == "length"
        asyncio.run(until_idle(engine))


def test_an_abort_waits_for_the_running_step_and_no_longer(
    new_core: NewCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a prompt of many steps: the step that runs is the last one that knows the request."""
    core = new_core(max_num_batched_tokens=32, max_model_len=2048, kv_cache_bytes=64 << 20)
    step, calls = core.step, [0]
    entered, gate = threading.Event(), threading.Event()

    def held_up() -> list[Output]:
        calls[0] += 1
        if calls[0] == 3:
            entered.set()
            assert gate.wait(20)
        return step()

    monkeypatch.setattr(core, "step", held_up)

    async def main() -> None:
        with Engine(core) as engine:
            reading = asyncio.create_task(read(engine, request("long", [5] * 1900, max_tokens=5)))
            await asyncio.to_thread(entered.wait, 20)
            engine.abort("long")
            gate.set()
            outputs = await reading
            assert outputs[-1].finish_reason == "abort"
            assert outputs[-1].stats is not None
            assert outputs[-1].stats.num_prefill_tokens == 3 * 32
            assert calls == [3]
            await until_idle(engine)
            assert engine.stats().kv_used_bytes == engine.stats().kv_cached_bytes

    asyncio.run(main())


@pytest.mark.slow
def test_a_thousand_streams_left_at_random_moments_hold_nothing(new_core: NewCore) -> None:
    """Left before the first token, between tokens, by cancellation, by abort or at their end; forty at a time."""
    core = new_core(max_num_batched_tokens=64, kv_cache_bytes=4 << 20)
    chance = random.Random(7)
    ends: Counter[str] = Counter()

    async def one(engine: Engine, number: int, free: asyncio.Semaphore) -> None:
        async with free:
            prompt = [chance.randrange(3, 500) for _ in range(chance.randint(1, 40))]
            depth = chance.choice([None, 0, 3])
            asked = request(f"r{number}", prompt, max_tokens=chance.randint(1, 9), draft_depth=depth)
            way = chance.choice(["cancel", "cancel", "abort", "abort", "close", "read"])
            task = asyncio.create_task(read(engine, asked))
            if way == "close":
                task.cancel()
                stream = engine.submit(request(f"s{number}", prompt, max_tokens=30))
                for _ in range(chance.randint(1, 4)):
                    await anext(stream, None)
                await stream.aclose()  # type: ignore[attr-defined]
            elif way != "read":
                await asyncio.sleep(chance.random() * 0.02)
                if way == "cancel":
                    task.cancel()
                else:
                    engine.abort(asked.request_id)
            try:
                ends[(await task)[-1].finish_reason or ""] += 1
            except asyncio.CancelledError:
                ends["cancelled"] += 1

    async def main() -> None:
        with Engine(core) as engine:
            free = asyncio.Semaphore(40)
            await asyncio.gather(*(one(engine, number, free) for number in range(1000)))
            await until_idle(engine)
            assert engine.stats().kv_used_bytes == engine.stats().kv_cached_bytes

            def check(owned: EngineCore) -> None:
                owned.check_integrity()
                assert owned.prefix is not None
                owned.prefix.clear()
                assert owned.cache.used_bytes == 0
                assert owned.cache.num_free_rows == 8

            engine.call(check).result(20)

    asyncio.run(main())
    assert sum(ends.values()) == 1000
    assert set(ends) == {"length", "abort", "cancelled"}
    assert min(ends.values()) > 50
