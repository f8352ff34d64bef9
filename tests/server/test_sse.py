"""Frames that are encoded around their text, against those that are encoded whole; work that ends with its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from stepflash.assistant.stream import Progress, StreamItem, TextLogprobs, Usage
from stepflash.chat.messages import ContentDelta, Conversation, Finish, ReasoningDelta
from stepflash.engine.request import SamplingParams, TokenLogprob
from stepflash.errors import ServerClosing
from stepflash.server.closing import Closing
from stepflash.server.openai_chat_decode import ChatRequest
from stepflash.server.openai_chat_encode import ResponseHead, frames
from stepflash.server.sse import frame, text_frame, unless_disconnected

TEXTS = st.text(st.characters(codec=None), max_size=20)  # lone surrogates too


@given(TEXTS, TEXTS)
def test_a_text_frame_is_the_frame_of_its_text(text: str, other: str) -> None:
    def data(text: str) -> dict[str, Any]:
        return {"model": other, "choices": [{"delta": {"a": text, "b": text}, "index": 0}], "end": "\n"}

    encode = text_frame(data)
    assert encode(text) == frame(data(text))
    assert encode("") == frame(data(""))


def test_pieces_of_text_in_one_batch_are_chunks_of_their_own() -> None:
    """With log-probabilities for some of them, each where it belongs."""
    told = TokenLogprob(token_id=7, logprob=-1.0)
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    batches: list[list[StreamItem]] = [
        [Progress((5,), (), usage), ReasoningDelta('a "thought"\n'), ContentDelta("é\u2028", 3)],
        [Progress((7,), (), usage), TextLogprobs((), (told,)), ContentDelta("b"), ContentDelta("c")],
        [Progress((), (), usage), Finish("stop")],
    ]

    async def given_batches() -> AsyncGenerator[tuple[int, list[StreamItem]]]:
        for batch in batches:
            yield 0, batch

    async def main() -> list[bytes]:
        head = ResponseHead(id="x", created=1, model="m", reasoning_fields=("reasoning_content", "reasoning"))
        asked = ChatRequest(
            conversation=Conversation(messages=()), sampling=SamplingParams(), include_usage=True
        )
        return [data async for data in frames(head, given_batches(), asked, lambda token_id: b"b")]

    written = asyncio.run(main())
    assert len(written) == 1 + len(batches)
    chunks = [
        json.loads(line.removeprefix("data: ")) for line in b"".join(written).decode().split("\n\n")[:-1]
    ]
    assert all((chunk["id"], chunk["created"], chunk["model"]) == ("x", 1, "m") for chunk in chunks)
    *choices, end = [chunk["choices"] for chunk in chunks]
    assert end == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert [choice["delta"] for (choice,) in choices] == [
        {"role": "assistant"},
        {"reasoning_content": 'a "thought"\n', "reasoning": 'a "thought"\n'},
        {"content": "é\u2028"},
        {"content": "b"},
        {"content": "c"},
        {},
    ]
    assert [choice["logprobs"] is not None for (choice,) in choices] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert choices[3][0]["logprobs"]["content"][0]["logprob"] == -1.0
    assert [choice["finish_reason"] for (choice,) in choices][-1] == "stop"


def test_requests_that_come_together_are_prepared_before_the_first_of_them_runs() -> None:
    order: list[str] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def work(name: str) -> None:
        order.append(f"{name} runs")

    async def handle(name: str) -> None:
        order.append(f"{name} is prepared")
        await unless_disconnected(receive, work(name), Closing())

    async def main() -> None:
        await asyncio.gather(handle("a"), handle("b"))

    asyncio.run(main())
    assert order == ["a is prepared", "b is prepared", "a runs", "b runs"]


@pytest.mark.parametrize("begins", [False, True])
def test_work_ends_with_the_time_of_the_server(begins: bool) -> None:
    closing, events = Closing(), list[str]()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> None:
        events.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("ended")

    async def main() -> None:
        if not begins:
            closing.end()
        handling = asyncio.create_task(unless_disconnected(receive, work(), closing))
        for _ in range(3):
            await asyncio.sleep(0)
        if begins:
            closing.end()
        with pytest.raises(ServerClosing):
            await handling

    asyncio.run(main())
    assert events == (["begun", "ended"] if begins else [])
