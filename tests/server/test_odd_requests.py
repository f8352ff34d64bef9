"""Requests that are wrong, or just about right: status, the error in the words of that API, a server that goes on.

A wrong one is answered with 4xx and the error body of its API, a borderline one perhaps with 200; none with 5xx, and
after each the same application answers a normal request.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from stepflash.server.body import Body
from stepflash.server.openapi import BODIES
from tests.scripted_engine import END, scripted_session
from tests.server.in_process import Client, client_of

CHAT, TEXT, RESPONSES, MESSAGES, COUNT = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
)
HELLO = [{"role": "user", "content": "hello"}]
RIGHT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    TEXT: {"prompt": "hello"},
    RESPONSES: {"input": "hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 50},
    COUNT: {"messages": HELLO},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.fixture(scope="module")
def client() -> Client:
    return client_of(scripted_session(f"t\n</think>\nHi{END}"), max_body_bytes=1_000_000)


def assert_is_error(path: str, response: httpx.Response) -> None:
    body = response.json()
    assert 400 <= response.status_code < 500, response.text
    if path.startswith(MESSAGES):
        assert body["type"] == "error"
        kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
        assert body["error"]["type"] == kinds.get(response.status_code, "invalid_request_error")
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]


def assert_goes_on(client: Client, path: str) -> None:
    assert client.post(path, json=RIGHT[path]).status_code == 200


# Bodies that are no JSON object of any API.
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "a space": b" ",
    "half": b'{"messages": [',
    "not JSON": b"hello",
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": Infinity}',
    "-Infinity": b'{"temperature": -Infinity}',
    "a list": b"[]",
    "a string": b'"hello"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "x"}'.encode("utf-16"),
    "a comma too many": b'{"model": "x",}',
    "single quotes": b"{'model': 'x'}",
    "two documents": b"{}{}",
    "a null byte": b'{"model": "\x00"}',
    "deep lists": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "deep and open": b"[" * 200_000,
    "a huge number": b'{"max_tokens": ' + b"9" * 5000 + b"}",
    "too large": b'{"model": "' + b"x" * 1_000_001 + b'"}',
}


@pytest.mark.parametrize("path", RIGHT)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_bodies(client: Client, path: str, name: str) -> None:
    response = client.post(path, content=BROKEN[name], headers={"content-type": "application/json"})
    assert_is_error(path, response)
    assert response.status_code == (413 if name == "too large" else 400)
    assert_goes_on(client, path)


# Values of fields that are wrong wherever the field is known; `messages` for chat and messages alike.
WRONG_EVERYWHERE: dict[str, list[Any]] = {
    "model": [1, [], {}, True, "other", "", "x" * 10_000],
    "temperature": [-1, 1e400, "hot", [], {}, 1000],
    "top_p": [-0.1, 0, 1.1, "x", []],
    "top_k": [-2, "x", 1.5],
    "stream": ["perhaps", 2, [], {}],
}
WRONG_MESSAGES: list[Any] = [
    [],
    {},
    "hello",
    1,
    [1],
    [None],
    [[]],
    [{}],
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": "king", "content": "x"}],
    [{"role": 1, "content": "x"}],
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": {}}],
    [{"role": "user", "content": [1]}],
    [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": [{"type": "song"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}]}],
    [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "%%%"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "%", "format": "wav"}}]}],
]
# (path, field, value): wrong for that API.
WRONG: list[tuple[str, str, Any]] = [
    *(
        (path, field, value)
        for path in RIGHT
        for field, values in WRONG_EVERYWHERE.items()
        for value in values
    ),
    *((path, "messages", value) for path in (CHAT, MESSAGES, COUNT) for value in WRONG_MESSAGES),
    *((CHAT, "max_tokens", value) for value in (0, -1, 1.5, "x")),
    *((CHAT, "max_completion_tokens", value) for value in (0, -1, "x")),
    *((CHAT, "n", value) for value in (0, -1, 10_000, "x", 1.5)),
    *((CHAT, "stop", value) for value in ([""], ["a"] * 1000, [1], {}, 5)),
    *((CHAT, "seed", value) for value in ("x", 1.5, [])),
    *((CHAT, "logit_bias", value) for value in ([], {"x": 1}, {"1": "x"}, {"99999999": 1}, {"-1": 1})),
    *((CHAT, "top_logprobs", value) for value in (-1, 21, "x", 1)),
    *((CHAT, "presence_penalty", value) for value in (-3, 3, "x")),
    *((CHAT, "frequency_penalty", value) for value in (-3, 3, "x")),
    *((CHAT, "reasoning_effort", value) for value in ("enormous", 1, [])),
    *((CHAT, "stream_options", value) for value in (1, [], {"include_usage": "perhaps"})),
    *(
        (CHAT, "tools", value)
        for value in (
            {},
            [1],
            [{}],
            [{"type": "function"}],
            [{"type": "function", "function": {}}],
            [{"type": "function", "function": {"name": 1}}],
            [{"type": "function", "function": {"name": ""}}],
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            [{"type": "function", "function": {"name": "f", "parameters": 1}}],
            [{"type": "function", "function": {"name": "f"}}] * 2,
        )
    ),
    *(
        (CHAT, "tool_choice", value)
        for value in ("perhaps", 1, [], {}, {"type": "function", "function": {"name": "absent"}}, "required")
    ),
    *(
        (CHAT, "response_format", value)
        for value in (
            1,
            [],
            {},
            {"type": "song"},
            {"type": "json_schema"},
            {"type": "json_schema", "json_schema": {}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}},
        )
    ),
    *(
        (TEXT, "prompt", value)
        for value in ([], [[]], [-1], [10**9], [1.5], {}, 1, [None], ["a", 1], [""] * 100)
    ),
    *((TEXT, "max_tokens", value) for value in (0, -1, "x")),
    *((TEXT, "logprobs", value) for value in (-1, 1000, "x")),
    *((TEXT, "best_of", value) for value in (5, "x")),
    *(
        (RESPONSES, "input", value)
        for value in (
            [],
            {},
            1,
            None,
            [1],
            [None],
            [{}],
            [{"type": "song"}],
            [{"role": "king", "content": "x"}],
            [{"role": "user", "content": 1}],
            [{"role": "user", "content": [{"type": "song"}]}],
            [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,%"}]}],
            [{"type": "function_call", "name": "f", "arguments": "{"}],
            [{"type": "function_call", "name": "f", "call_id": "1", "arguments": "[]"}],
            [{"type": "function_call_output", "output": "x"}],
            [{"type": "custom_tool_call", "name": "f", "call_id": "1"}],
            [{"type": "reasoning", "content": 1}],
        )
    ),
    *((RESPONSES, "max_output_tokens", value) for value in (0, -1, "x")),
    *((RESPONSES, "previous_response_id", value) for value in ("resp_none", 1, "")),
    *((RESPONSES, "tools", value) for value in ({}, [1], [{"type": "function"}], [{"type": "custom"}])),
    *((RESPONSES, "tool_choice", value) for value in ("perhaps", 1, {"type": "function", "name": "absent"})),
    *(
        (RESPONSES, "text", value)
        for value in (1, {"format": {"type": "song"}}, {"format": {"type": "json_schema"}})
    ),
    *((RESPONSES, "reasoning", value) for value in (1, [], {"effort": "enormous"})),
    *((MESSAGES, "max_tokens", value) for value in (0, -1, "x", None, 1.5)),
    *((MESSAGES, "system", value) for value in (1, {}, [1], [{"type": "song"}])),
    *((MESSAGES, "stop_sequences", value) for value in ("x", [1], {}, [""], ["a"] * 10_000)),
    *((MESSAGES, "thinking", value) for value in (1, {}, {"type": "x"})),
    *(
        (MESSAGES, "tools", value)
        for value in (
            {},
            [1],
            [{}],
            [{"name": "f", "input_schema": 1}],
            [{"name": "f", "input_schema": SCHEMA}] * 2,
        )
    ),
    *(
        (MESSAGES, "tool_choice", value)
        for value in (1, {}, {"type": "tool"}, {"type": "tool", "name": "absent"})
    ),
]


@pytest.mark.parametrize(
    ("path", "field", "value"), WRONG, ids=[f"{p}-{f}-{json.dumps(v)[:40]}" for p, f, v in WRONG]
)
def test_wrong_values(client: Client, path: str, field: str, value: Any) -> None:
    body = json.dumps({**RIGHT[path], field: value}).replace("Infinity", "1e400")
    response = client.post(path, content=body)
    if path == COUNT and field in ("temperature", "top_p", "top_k", "stream"):
        assert response.status_code in (200, 400)  # no field of this one, so its value means nothing
    elif field == "model" and value in ("other", "", "x" * 10_000):
        assert response.status_code == 404
        assert_is_error(path, response) if path.startswith(MESSAGES) else None
    else:
        assert_is_error(path, response)
        assert response.status_code == 400
    assert_goes_on(client, path)


@pytest.mark.parametrize("path", RIGHT)
def test_null_is_the_same_as_nothing_for_every_optional_field(client: Client, path: str) -> None:
    fields = BODIES[path].model_fields
    # No token may be asked for without a number of tokens, so this one is none that may be null.
    optional = [name for name in fields if not fields[name].is_required() and name != "max_tokens"]
    for name in set(optional) - RIGHT[path].keys():
        response = client.post(path, json={**RIGHT[path], name: None})
        assert response.status_code == 200, (name, response.text)
    assert client.post(path, json={**dict.fromkeys(optional), **RIGHT[path]}).status_code == 200


# More than there is, or words that mean nothing here.
BORDERLINE: list[tuple[str, str, Any]] = [
    *((path, "top_k", 2**70) for path in (CHAT, TEXT, RESPONSES, MESSAGES)),
    *((path, "seed", 2**62) for path in (CHAT, TEXT, RESPONSES, MESSAGES)),
    *((path, "temperature", value) for path in (CHAT, TEXT, RESPONSES, MESSAGES) for value in (0, 1e-300, 2)),
    (CHAT, "max_tokens", 2**70),
    (CHAT, "stop", []),
    (CHAT, "tools", []),
    (CHAT, "logit_bias", {}),
    (MESSAGES, "max_tokens", 2**70),
    (MESSAGES, "thinking", {"type": "enabled"}),
    (MESSAGES, "metadata", {"user_id": None}),
    (MESSAGES, "stop_sequences", []),
    (TEXT, "prompt", ""),
    (RESPONSES, "max_output_tokens", 2**70),
    (RESPONSES, "metadata", {}),
]


@pytest.mark.parametrize(("path", "field", "value"), BORDERLINE, ids=str)
def test_borderline_values_are_taken(client: Client, path: str, field: str, value: Any) -> None:
    response = client.post(path, json={**RIGHT[path], field: value})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", RIGHT)
def test_borderline_requests_are_answered(client: Client, path: str) -> None:
    right = json.dumps(RIGHT[path]).encode()
    odd = json.dumps({**RIGHT[path], "a field of tomorrow": {"x": [1]}, "\u0000\U0001f600": 1}).encode()
    for content, headers in (
        (right, {"content-type": "text/plain"}),
        (right, {"content-type": "application/x-www-form-urlencoded"}),
        (right, {}),
        (b"\n\t " + right + b"\n", {}),
        (odd, {}),
        (right[:-1] + b', "model": "scripted", "model": "scripted"}', {}),
    ):
        assert client.post(path, content=content, headers=headers).status_code == 200, content
    # A byte order mark is no JSON, nor is half a character.
    for content in (b"\xef\xbb\xbf" + right, right[:-1] + rb', "\ud800": 1}'):
        response = client.post(path, content=content)
        assert response.status_code == 400
        assert_is_error(path, response)
    assert_goes_on(client, path)


@pytest.mark.parametrize("path", RIGHT)
def test_wrong_methods_and_paths(client: Client, path: str) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"):
        response = _request(client, method, path)
        assert response.status_code == 405, method
        if method != "HEAD":
            assert_is_error(path, response)
    for wrong in (f"{path}/", f"{path}x", path.upper(), f"/{path}", f"{path}/../x", f"{path}%00"):
        response = client.post(wrong, json=RIGHT[path])
        assert response.status_code in (307, 404, 405), wrong
    assert_goes_on(client, path)


@pytest.mark.parametrize("path", RIGHT)
def test_a_body_in_pieces_is_read_and_a_large_one_is_stopped(client: Client, path: str) -> None:
    right = json.dumps(RIGHT[path]).encode()

    async def pieces() -> Any:
        for at in range(0, len(right), 3):
            yield right[at : at + 3]

    assert client.post(path, content=pieces()).status_code == 200

    async def endless() -> Any:
        while True:
            yield b" " * 100_000

    response = client.post(path, content=endless())
    assert response.status_code == 413
    assert_is_error(path, response)
    assert_goes_on(client, path)


def _request(client: Client, method: str, path: str) -> httpx.Response:
    return asyncio.run(client._request(method, path))


@pytest.mark.parametrize("path", BODIES)
def test_of_many_wrong_items_only_the_first_is_told(path: str) -> None:
    """pydantic would make an error of hundreds of bytes for each, which from a large body are gigabytes."""
    for field in BODIES[path].model_fields:
        for wrong in ([1.5] * 1000, [[1.5] * 1000], {str(i): [] for i in range(1000)}):
            # One for each member of a union, and one for each other field that is missing.
            assert num_errors(BODIES[path], {field: wrong}) <= 8, field


def num_errors(body_type: type[Body], values: dict[str, Any]) -> int:
    try:
        body_type.model_validate(values)
    except ValidationError as error:
        return error.error_count()
    return 0
