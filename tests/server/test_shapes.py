"""Every object and every event that leaves the server, against the types that the official packages publish.

The packages themselves take anything; here nothing passes that their types do not say: required fields are there,
values are of the type, words are among those listed, and a field that the type does not know is one of those that
docs/api.md lists as ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest

from stepflash.server.app import create_app
from tests.scripted_engine import END, scripted_session
from tests.server.in_process import Client, client_of

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
anthropic_pages = pytest.importorskip("anthropic.pagination")
openai_pages = pytest.importorskip("openai.pagination")
pytestmark = pytest.mark.client

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
RESPONSE_TOOLS = [
    {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False},
    {"type": "custom", "name": "patch"},
]
MESSAGE_TOOL = {"name": "weather", "input_schema": SCHEMA}
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
PATCH = "<tool_call>\n<function=patch>\n<parameter=input>\n*** x\n</parameter>\n</function>\n</tool_call>"
THOUGHT = "a thought\n</think>\n"
FULL = f"{THOUGHT}Hi{CALL}{CALL}bye{END}"

CHAT, TEXT, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
CHAT_TYPES = (openai.types.chat.ChatCompletion, openai.types.chat.ChatCompletionChunk)
TEXT_TYPES = (openai.types.Completion, openai.types.Completion)
RESPONSE_TYPES = (openai.types.responses.Response, openai.types.responses.ResponseStreamEvent)
MESSAGE_TYPES = (anthropic.types.Message, anthropic.types.RawMessageStreamEvent)
BETA_TYPES = (anthropic.types.beta.BetaMessage, anthropic.types.beta.BetaRawMessageStreamEvent)


class OpenAIError(pydantic.BaseModel):
    """The body around the package's type of an error."""

    error: openai.types.shared.ErrorObject


def judged(kind: Any, data: Any) -> set[str]:
    """The fields that `kind` does not know, as `Type.field`; anything else that is wrong fails."""
    try:
        value = pydantic.TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as wrong:
        raise AssertionError(f"{json.dumps(data)}\n{wrong}") from None
    return set(_unknown(value))


def _unknown(value: Any) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        for name in value.model_extra or ():
            yield f"{type(value).__name__}.{name}"
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _unknown(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _unknown(item)


def ours() -> set[str]:
    """The list in docs/api.md of fields that no official type has."""
    section = DOCUMENT.read_text().partition("## Fields of ours in replies\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`(\w+\.\w+)`", section))


def judged_event(kind: Any, event: dict[str, Any]) -> set[str]:
    """Two things that the services send are in no type: pings, and the null of a text completion that goes on."""
    if event == {"type": "ping"} and kind in (MESSAGE_TYPES[1], BETA_TYPES[1]):
        return set()
    if kind is openai.types.Completion:
        choices = [
            {**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in event["choices"]
        ]
        return judged(kind, {**event, "choices": choices})
    return judged(kind, event)


def judged_error(path: str, error: Any) -> set[str]:
    if not path.startswith(MESSAGES):
        return judged(OpenAIError, error)
    # Documented for bodies that are too large, and missing among the types.
    if error.get("error", {}).get("type") == "request_too_large":
        error = {**error, "error": {**error["error"], "type": "invalid_request_error"}}
    return judged(anthropic.types.ErrorResponse, error)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """What the frames of a stream hold."""
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = re.findall(r"^data: (.*)$", response.text, re.MULTILINE)
    return [json.loads(data) for data in frames if data != "[DONE]"]


# What was seen of our own fields by all cases, for the last test of the file.
SEEN: set[str] = set()

CASES: dict[str, tuple[str, Sequence[Any], str, dict[str, Any]]] = {
    "chat": (CHAT, CHAT_TYPES, f"{THOUGHT}Hi{END}", {}),
    "chat without a thought": (CHAT, CHAT_TYPES, f"Hi{END}", {"reasoning_effort": "none"}),
    "chat, empty": (CHAT, CHAT_TYPES, END, {"reasoning_effort": "none"}),
    "chat, tools": (CHAT, CHAT_TYPES, FULL, {"tools": [CHAT_TOOL]}),
    "chat, one call": (CHAT, CHAT_TYPES, FULL, {"tools": [CHAT_TOOL], "parallel_tool_calls": False}),
    "chat, choices": (CHAT, CHAT_TYPES, f"{THOUGHT}Hi{END}", {"n": 3}),
    "chat, logprobs": (CHAT, CHAT_TYPES, f"{THOUGHT}Hi é{END}", {"logprobs": True, "top_logprobs": 2}),
    "chat, usage": (CHAT, CHAT_TYPES, FULL, {"stream_options": {"include_usage": True}}),
    "chat, running usage": (
        CHAT,
        CHAT_TYPES,
        FULL,
        {"n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat, cut": (CHAT, CHAT_TYPES, FULL, {"max_tokens": 12}),
    "chat, cut in the thought": (CHAT, CHAT_TYPES, FULL, {"max_completion_tokens": 3}),
    "chat, stopped": (CHAT, CHAT_TYPES, f"{THOUGHT}Hi there{END}", {"stop": ["there"]}),
    "chat, deadline": (CHAT, CHAT_TYPES, f"{THOUGHT}Hi there{END}", {"deadline_seconds": 60}),
    "chat, budget": (CHAT, CHAT_TYPES, f"{THOUGHT}Hi{END}", {"max_thinking_tokens": 4}),
    "text": (TEXT, TEXT_TYPES, f" world{END}", {}),
    "text, echo": (TEXT, TEXT_TYPES, f" world{END}", {"echo": True, "n": 2}),
    "text, prompts": (TEXT, TEXT_TYPES, f" world{END}", {"prompt": ["a", "b"]}),
    "text, logprobs": (TEXT, TEXT_TYPES, f" é{END}", {"logprobs": 2}),
    "text, usage": (TEXT, TEXT_TYPES, f" world{END}", {"stream_options": {"include_usage": True}}),
    "text, cut": (TEXT, TEXT_TYPES, " world and more", {"max_tokens": 2}),
    "response": (RESPONSES, RESPONSE_TYPES, f"{THOUGHT}Hi{END}", {}),
    "response without a thought": (RESPONSES, RESPONSE_TYPES, f"Hi{END}", {"reasoning": {"effort": "none"}}),
    "response, empty": (RESPONSES, RESPONSE_TYPES, END, {"reasoning": {"effort": "none"}}),
    "response, tools": (
        RESPONSES,
        RESPONSE_TYPES,
        f"{THOUGHT}Hi{CALL}{PATCH}bye{END}",
        {"tools": RESPONSE_TOOLS, "tool_choice": "auto", "metadata": {"a": "b"}, "instructions": "Be brief."},
    ),
    "response, tool choice": (
        RESPONSES,
        RESPONSE_TYPES,
        f"{THOUGHT}{CALL}{END}",
        {"tools": RESPONSE_TOOLS[:1], "tool_choice": {"type": "function", "name": "weather"}},
    ),
    "response, schema": (
        RESPONSES,
        RESPONSE_TYPES,
        f'{THOUGHT}{{"city": "Oslo"}}{END}',
        {"text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}, "verbosity": "low"}},
    ),
    "response, logprobs": (
        RESPONSES,
        RESPONSE_TYPES,
        f"{THOUGHT}Hi é{END}",
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    ),
    "response, sealed": (
        RESPONSES,
        RESPONSE_TYPES,
        FULL,
        {"include": ["reasoning.encrypted_content"], "store": False, "reasoning": {"summary": "auto"}},
    ),
    "response, everything told": (
        RESPONSES,
        RESPONSE_TYPES,
        f"{THOUGHT}Hi{END}",
        {
            "temperature": 0.5,
            "top_p": 0.9,
            "max_output_tokens": 100,
            "parallel_tool_calls": False,
            "user": "u",
            "truncation": "disabled",
            "service_tier": "auto",
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "max_tool_calls": 2,
            "background": False,
        },
    ),
    "response, incomplete": (RESPONSES, RESPONSE_TYPES, FULL, {"max_output_tokens": 12}),
    "response, incomplete thought": (RESPONSES, RESPONSE_TYPES, FULL, {"max_output_tokens": 2}),
    "message": (MESSAGES, MESSAGE_TYPES, f"Hi{END}", {"thinking": {"type": "disabled"}}),
    "message, thought": (
        MESSAGES,
        MESSAGE_TYPES,
        f"{THOUGHT}Hi{END}",
        {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000},
    ),
    "message, hidden thought": (
        MESSAGES,
        MESSAGE_TYPES,
        f"{THOUGHT}Hi{END}",
        {"thinking": {"type": "adaptive", "display": "omitted"}},
    ),
    "message, tools": (MESSAGES, MESSAGE_TYPES, FULL, {"tools": [MESSAGE_TOOL]}),
    "message, cut": (MESSAGES, MESSAGE_TYPES, FULL, {"max_tokens": 12}),
    "message, stopped": (MESSAGES, MESSAGE_TYPES, f"{THOUGHT}Hi there{END}", {"stop_sequences": ["there"]}),
    "message, empty": (MESSAGES, MESSAGE_TYPES, END, {"thinking": {"type": "disabled"}}),
}
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    TEXT: {"prompt": "hello"},
    RESPONSES: {"input": "hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 500},
}


@pytest.mark.parametrize("case", CASES)
def test_replies_and_events_are_of_the_published_types(case: str) -> None:
    path, types, text, options = CASES[case]
    client = client_of(scripted_session(text, bursts=[3, 1], pause=0.0))
    body = {"model": "scripted", **BASE[path], **options}
    whole = client.post(path, json={name: value for name, value in body.items() if name != "stream_options"})
    assert whole.status_code == 200, whole.text
    streamed = events_of(client.post(path, json={**body, "stream": True}))
    assert len(streamed) > 1
    for whole_type, event_type in (types, BETA_TYPES) if path == MESSAGES else (types,):
        seen = judged(whole_type, whole.json()) | {
            x for event in streamed for x in judged_event(event_type, event)
        }
        # Anthropic's beta types have names of their own for the same.
        seen = {name.removeprefix("Beta") for name in seen}
        SEEN.update(seen)
        assert seen <= ours(), f"not in the types and not in docs/api.md: {sorted(seen - ours())}"


@pytest.mark.parametrize("path", BASE)
def test_what_goes_wrong_in_a_stream_is_of_the_published_types(path: str) -> None:
    session = scripted_session("some words of a thought. " * 9, error="NaN logits", error_after=90)
    streamed = events_of(
        client_of(session).post(
            path, json={**BASE[path], **({"max_tokens": 500} if path == TEXT else {}), "stream": True}
        )
    )
    kinds = {CHAT: CHAT_TYPES, TEXT: TEXT_TYPES, RESPONSES: RESPONSE_TYPES, MESSAGES: MESSAGE_TYPES}
    *before, last = streamed
    if path == RESPONSES:
        assert last["type"] == "response.failed"
        before.append(last)
    else:
        assert judged_error(path, last) <= ours()
    assert len(before) > 1
    for event in before:
        assert judged_event(kinds[path][1], event) <= ours()


@pytest.mark.parametrize(
    "path", [*BASE, "/v1/messages/count_tokens", "/v1/models/nobody", "/v1/messages/no", "/v1/no"]
)
@pytest.mark.parametrize("body", [b"{", b'{"model": "other"}', b"[]", b"{}"])
def test_refusals_are_of_the_published_types(path: str, body: bytes) -> None:
    client = client_of(scripted_session("x" + END))
    response = client.get(path) if "models" in path else client.post(path, content=body)
    assert 400 <= response.status_code < 500
    assert judged_error(path, response.json()) <= ours()


def test_refusals_of_limits_are_of_the_published_types() -> None:
    for path in BASE:
        guarded = client_of(scripted_session("x" + END), api_keys=("key",))
        assert guarded.post(path, json=BASE[path]).status_code == 401
        assert judged_error(path, guarded.post(path, json=BASE[path]).json()) <= ours()
        small = client_of(scripted_session("x" + END), max_body_bytes=10)
        assert small.post(path, json=BASE[path]).status_code == 413
        assert judged_error(path, small.post(path, json=BASE[path]).json()) <= ours()
        broken = client_of(scripted_session("x" + END, error="NaN logits"))
        failed = broken.post(path, json=BASE[path])
        assert failed.status_code == 500
        assert judged_error(path, failed.json()) <= ours()
        rare = client_of(scripted_session("x" + END), requests_per_minute=1)
        rare.post(path, json=BASE[path])
        assert rare.post(path, json=BASE[path]).status_code == 429
        assert judged_error(path, rare.post(path, json=BASE[path]).json()) <= ours()


def test_models_and_counts_are_of_the_published_types() -> None:
    client = client_of(scripted_session("x" + END))
    page, model = client.get("/v1/models").json(), client.get("/v1/models/scripted").json()
    count = client.post("/v1/messages/count_tokens", json={"messages": HELLO}).json()
    # One route serves both packages, so each type finds the other's fields beside its own.
    whole = {openai.types.Model: openai_pages.SyncPage, anthropic.types.ModelInfo: anthropic_pages.SyncPage}
    seen = {
        re.sub(r"\[.*\]", "", name)
        for kind, list_kind in whole.items()
        for name in judged(kind, model) | judged(list_kind[kind], page)
    }
    SEEN.update(seen)
    assert seen <= ours(), sorted(seen - ours())
    assert not judged(anthropic.types.MessageTokensCount, count)
    assert not judged(anthropic.types.beta.BetaMessageTokensCount, count)


def test_stored_responses_are_of_the_published_types() -> None:
    client = client_of(scripted_session(FULL))
    for options in ({"tools": RESPONSE_TOOLS}, {"max_output_tokens": 5}):
        made = client.post(RESPONSES, json={"input": HELLO, **options}).json()
        one = f"{RESPONSES}/{made['id']}"
        assert client.get(one).json() == made
        items = client.get(f"{one}/input_items").json()
        assert not judged(openai.types.responses.ResponseItemList, items)
        refused = client.post(f"{one}/cancel")
        assert refused.status_code == 400
        assert not judged_error(RESPONSES, refused.json())
        assert client.delete(one).status_code == 200
        assert not judged_error(RESPONSES, client.get(one).json())


def test_a_cancelled_response_is_of_the_published_types() -> None:
    session = scripted_session(f"{THOUGHT}{'x' * 300}{END}", pause=0.01)
    app = create_app(session, "scripted")
    client = Client(app)

    async def run() -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        routes = {route.path: route.endpoint for route in app.routes if hasattr(route, "endpoint")}
        running = routes["/v1/responses"].__self__._running
        streaming = asyncio.create_task(
            client._request("POST", RESPONSES, json={"input": "a", "stream": True})
        )
        while not running:
            await asyncio.sleep(0.01)
        (name,) = running
        now = await client._request("GET", f"{RESPONSES}/{name}")
        cancelled = await client._request("POST", f"{RESPONSES}/{name}/cancel")
        with contextlib.suppress(asyncio.CancelledError):
            return events_of(await streaming), now.json(), cancelled.json()
        raise AssertionError

    streamed, now, cancelled = asyncio.run(run())
    assert (now["status"], cancelled["status"]) == ("in_progress", "cancelled")
    for event in streamed:
        assert judged(openai.types.responses.ResponseStreamEvent, event) <= ours()
    for response in (now, cancelled, streamed[-1]["response"]):
        assert judged(openai.types.responses.Response, response) <= ours()


def test_every_field_of_ours_occurs() -> None:
    """So that the list does not outlive what it lists."""
    for case in CASES:
        test_replies_and_events_are_of_the_published_types(case)
    test_models_and_counts_are_of_the_published_types()
    assert ours() == SEEN
