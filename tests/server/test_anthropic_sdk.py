"""The official anthropic package against the application: its types must accept everything that we send."""

import asyncio
import importlib
from typing import Any

import pytest

from stepflash.server.app import create_app
from tests.scripted_engine import END, scripted_session

anthropic = pytest.importorskip("anthropic")
# Newer versions of the package bring an httpx of their own name.
httpx = importlib.import_module(anthropic.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
pytestmark = pytest.mark.client

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
THINK = {"type": "enabled", "budget_tokens": 1024}


def client_for(*texts: str, max_context_tokens: int = 4096, **options: Any) -> Any:
    app = create_app(
        scripted_session(*texts, bursts=[3], max_context_tokens=max_context_tokens, **options), "scripted"
    )
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    return anthropic.AsyncAnthropic(
        base_url="http://test", api_key="none", max_retries=0, http_client=http_client
    )


def create(client: Any, **body: Any) -> Any:
    fields = {"model": "scripted", "max_tokens": 1000, "messages": HELLO, **body}
    return asyncio.run(client.messages.create(**fields))


def test_whole_message() -> None:
    message = create(client_for("t\n</think>\nHi" + CALL + END), tools=TOOLS, thinking=THINK)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert (message.content[0].thinking, message.content[1].text) == ("t", "Hi")
    assert message.content[2].input == {"city": "Oslo"}
    assert message.stop_reason == "tool_use"
    assert message.usage.cache_read_input_tokens == 1
    assert message._request_id.startswith("req_")


def test_the_streaming_helper_gives_the_same_message() -> None:
    text = "t\n</think>\nHi" + CALL + END
    options = {"model": "scripted", "max_tokens": 1000, "messages": HELLO, "tools": TOOLS, "thinking": THINK}

    async def run() -> tuple[list[str], Any]:
        async with client_for(text).messages.stream(**options) as stream:
            kinds = [event.type async for event in stream]
            return kinds, await stream.get_final_message()

    kinds, message = asyncio.run(run())
    assert {"message_start", "thinking", "text", "input_json", "content_block_stop", "message_stop"} <= {
        *kinds
    }
    whole = create(client_for(text), tools=TOOLS, thinking=THINK)

    def plain(message: Any) -> Any:
        blocks = [block.to_dict() for block in message.content]
        return [{k: v for k, v in block.items() if k != "id"} for block in blocks], message.usage.to_dict()

    assert plain(message) == plain(whole)
    assert message.stop_reason == whole.stop_reason == "tool_use"


def test_stop_sequence_and_given_text() -> None:
    given = [*HELLO, {"role": "assistant", "content": "{"}]
    message = create(client_for('"a": 1} STOP' + END), messages=given, stop_sequences=[" STOP"])
    assert message.content[0].text == '"a": 1}'
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " STOP")


def test_count_tokens_and_models() -> None:
    client = client_for("x")
    count = asyncio.run(client.messages.count_tokens(model="scripted", messages=HELLO, tools=TOOLS))
    assert count.input_tokens > 100

    async def models() -> list[Any]:
        return [model async for model in client_for("x").models.list()]

    (model,) = asyncio.run(models())
    assert (model.id, model.type, model.max_input_tokens) == ("scripted", "model", 4096)
    assert model.created_at.year > 2000


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "other"}, "NotFoundError"),
        ({"max_tokens": 0}, "BadRequestError"),
        ({"messages": []}, "BadRequestError"),
    ],
)
def test_errors_have_their_class(options: dict[str, Any], error: str) -> None:
    with pytest.raises(getattr(anthropic, error)) as caught:
        create(client_for("x"), **options)
    assert caught.value.body["type"] == "error"


def test_a_prompt_that_does_not_fit() -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        create(client_for("x", max_context_tokens=20))


def test_an_engine_error_has_its_class() -> None:
    with pytest.raises(anthropic.InternalServerError, match="NaN logits"):
        create(client_for("abc", error="NaN logits"))


def test_an_error_in_a_stream_is_raised() -> None:
    async def run() -> None:
        client = client_for("abcdefghi", error="NaN logits", error_after=2)
        options = {"model": "scripted", "max_tokens": 100, "messages": HELLO}
        async with client.messages.stream(**options) as stream:
            async for _ in stream:
                pass

    with pytest.raises(anthropic.APIStatusError, match="NaN logits"):
        asyncio.run(run())
