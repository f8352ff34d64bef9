"""The official openai package against the application: its types must accept everything that we send."""

import asyncio
from typing import Any, Literal

import httpx
import pydantic
import pytest

from stepflash.server.app import create_app
from tests.scripted_engine import END, scripted_session

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.client

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"


def client_for(*texts: str) -> Any:
    app = create_app(scripted_session(*texts, bursts=[3]), "scripted")
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client
    )


def test_whole_reply_with_logprobs() -> None:
    completion = asyncio.run(
        client_for("t\n</think>\nHi" + END).chat.completions.create(
            model="scripted", messages=HELLO, logprobs=True, top_logprobs=1
        )
    )
    (choice,) = completion.choices
    assert (choice.message.content, choice.message.reasoning_content) == ("Hi", "t")
    assert [token.token for token in choice.logprobs.content] == ["H", "i"]
    assert len(choice.logprobs.content[0].top_logprobs) == 1
    assert completion.usage.completion_tokens_details.reasoning_tokens == 3


def test_the_streaming_helper_collects_tool_calls() -> None:
    async def run() -> Any:
        client = client_for("t\n</think>\n" + CALL + CALL + END)
        async with client.chat.completions.stream(model="scripted", messages=HELLO, tools=TOOLS) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    (choice,) = asyncio.run(run()).choices
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "weather"]
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Oslo"}'


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "other"}, "NotFoundError"),
        ({"temperature": -1}, "BadRequestError"),
        ({"n": 100}, "BadRequestError"),
    ],
)
def test_errors_have_their_class(options: dict[str, Any], error: str) -> None:
    call = client_for("x").chat.completions.create(**{"model": "scripted", "messages": HELLO, **options})
    with pytest.raises(getattr(openai, error)):
        asyncio.run(call)


def test_an_error_in_a_stream_is_raised() -> None:
    app = create_app(scripted_session("abcdef", error="NaN logits", error_after=3), "scripted")

    async def run() -> None:
        http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http_client)
        stream = await client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
        async for _ in stream:
            pass

    with pytest.raises(openai.APIError, match="NaN logits"):
        asyncio.run(run())


def test_text_completion_and_models() -> None:
    client = client_for(" world" + END)
    completion = asyncio.run(client.completions.create(model="scripted", prompt="hello", logprobs=0))
    assert completion.choices[0].text == " world"
    model = asyncio.run(client_for("x").models.retrieve("scripted"))
    assert model.id == "scripted"


RESPONSE_TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    },
    {"type": "custom", "name": "patch"},
]
PATCH = "<tool_call>\n<function=patch>\n<parameter=input>\n*** x\n</parameter>\n</function>\n</tool_call>"


def test_a_whole_response_is_stored_and_continued() -> None:
    async def run() -> Any:
        client = client_for("t\n</think>\nHi" + END)
        first = await client.responses.create(model="scripted", input="hello")
        second = await client.responses.create(
            model="scripted", input="again", previous_response_id=first.id, instructions="Be brief."
        )
        assert (await client.responses.retrieve(second.id)).output_text == second.output_text
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        return second

    response = asyncio.run(run())
    assert (response.output_text, response.status) == ("Hi", "completed")
    assert response.output[0].content[0].text == "t"
    assert response.usage.output_tokens_details.reasoning_tokens == 3
    # Strictly by the package's own types, which the client itself does not insist on.
    type(response).model_validate(response.to_dict(), strict=False)


def test_the_streaming_helper_of_responses_gives_the_same() -> None:
    text = "t\n</think>\nHi" + CALL + PATCH + "bye" + END

    async def run() -> tuple[list[Any], Any]:
        async with client_for(text).responses.stream(
            model="scripted", input="hello", tools=RESPONSE_TOOLS
        ) as stream:
            events = [event async for event in stream]
            return events, await stream.get_final_response()

    events, response = asyncio.run(run())
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "custom_tool_call",
        "message",
    ]
    assert response.output_text == "Hibye"
    assert response.output[2].arguments == '{"city": "Oslo"}'
    assert response.output[3].input == "*** x"
    assert events[-1].type == "response.completed"
    whole = asyncio.run(
        client_for(text).responses.create(model="scripted", input="hello", tools=RESPONSE_TOOLS)
    )
    assert whole.output_text == response.output_text
    assert whole.usage == response.usage


def test_every_event_of_a_response_is_one_that_the_package_knows() -> None:
    any_event = pydantic.TypeAdapter(openai.types.responses.ResponseStreamEvent)

    async def run() -> list[Any]:
        client = client_for("t\n</think>\nHi" + CALL + PATCH + END)
        stream = await client.responses.create(
            model="scripted", input="hello", tools=RESPONSE_TOOLS, stream=True
        )
        return [event.to_dict() async for event in stream]

    for event in asyncio.run(run()):
        assert any_event.validate_python(event).type == event["type"]


def test_errors_of_responses_have_their_class() -> None:
    for options, error in (
        ({"model": "other"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"previous_response_id": "resp_x"}, openai.BadRequestError),
    ):
        call = client_for("x").responses.create(**{"model": "scripted", "input": "hello", **options})
        with pytest.raises(error):
            asyncio.run(call)


class Point(pydantic.BaseModel):
    """With what pydantic's schemas are made of: references, unions with null, enumerations."""

    class Label(pydantic.BaseModel):
        text: str

    x: int
    color: Literal["red", "green"]
    label: Label | None


POINT = '{"x": 3, "color": "red", "label": {"text": "here"}}'
POINT_CALL = (
    "<tool_call>\n<function=Point>\n<parameter=x>\n3\n</parameter>\n<parameter=color>\nred\n</parameter>\n"
    '<parameter=label>\n{"text": "here"}\n</parameter>\n</function>\n</tool_call>'
)
EXPECTED = Point(x=3, color="red", label=Point.Label(text="here"))


def test_answers_parse_into_pydantic_models() -> None:
    chat = client_for(f"t\n</think>\n{POINT}{END}").chat.completions
    parsed = asyncio.run(chat.parse(model="scripted", messages=HELLO, response_format=Point))
    assert parsed.choices[0].message.parsed == EXPECTED
    responses = client_for(f"t\n</think>\n{POINT}{END}").responses
    assert (
        asyncio.run(responses.parse(model="scripted", input="hello", text_format=Point)).output_parsed
        == EXPECTED
    )


def test_calls_of_strict_tools_parse_into_pydantic_models() -> None:
    chat = client_for(f"t\n</think>\n{POINT_CALL}{END}").chat.completions
    tools = [openai.pydantic_function_tool(Point)]
    parsed = asyncio.run(chat.parse(model="scripted", messages=HELLO, tools=tools))
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == EXPECTED
    wrong = client_for(f"t\n</think>\n{POINT_CALL.replace('red', 'blue')}{END}").chat.completions
    with pytest.raises(openai.InternalServerError, match="the constraint"):
        asyncio.run(wrong.parse(model="scripted", messages=HELLO, tools=tools))
