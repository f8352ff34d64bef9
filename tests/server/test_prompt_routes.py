"""The routes that show prompts agree with what the engine gets."""

from typing import Any

import pytest

from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.in_process import client_of

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "\u65e5\u672c \U0001f680?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_a_prompt_is_shown_as_it_is_run(tools: list[Any]) -> None:
    session = scripted_session("x" + END)
    client = client_of(session)
    body = {"messages": MESSAGES, "tools": tools}
    client.post("/v1/chat/completions", json=body)
    token_ids = list(engine_of(session).requests[0].prompt_token_ids)
    shown = client.post("/tokenize", json=body).json()
    assert shown == {"tokens": token_ids, "count": len(token_ids), "max_model_len": 4096}
    prompt = client.post("/apply-template", json=body).json()["prompt"]
    assert client.post("/tokenize", json={"content": prompt}).json()["tokens"] == token_ids
    assert client.post("/detokenize", json={"tokens": token_ids}).json()["content"] == prompt
    pieces = client.post("/tokenize", json={"content": "ab", "with_pieces": True}).json()["tokens"]
    assert [piece["piece"] for piece in pieces] == ["a", "b"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "messages"),
        ("/tokenize", {"content": 3}, "content"),
        ("/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": MESSAGES, "tools": [{}]}, "tools[0].function"),
    ],
)
def test_errors_name_the_field(path: str, body: dict[str, Any], param: str) -> None:
    response = client_of(scripted_session("x")).post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/apply-template"])
def test_deeply_nested_json_is_a_client_error(path: str) -> None:
    response = client_of(scripted_session("x")).post(path, content=b'{"messages": ' + b"[" * 200_000)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
