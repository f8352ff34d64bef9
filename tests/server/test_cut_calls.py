"""A call in the middle of which the limit of tokens came is nobody's whole call: agents run what they can parse."""

import json
from typing import Any

import pytest

from tests.scripted_engine import engine_of, scripted_session
from tests.server.in_process import client_of, named_events

CUT = "hm\n</think>\nok<tool_call>\n<function=bash>\n<parameter=command>\nrm -rf /home/me"
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
FUNCTION = {"name": "bash", "parameters": PARAMETERS}
BEGUN = '{"command": "rm -rf /home/me'
HELLO = [{"role": "user", "content": "hello"}]


def post(path: str, text: str = CUT, **body: Any) -> Any:
    return client_of(scripted_session(text, bursts=(3,))).post(path, json=body)


def test_chat_completions() -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    body: dict[str, Any] = {"messages": HELLO, "tools": tools}
    (choice,) = post("/v1/chat/completions", **body).json()["choices"]
    (made,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], made["function"]) == ("length", {"name": "bash", "arguments": BEGUN})

    # What an agent sends back, with what it says of the call.
    result = {"role": "tool", "tool_call_id": made["id"], "content": "error: no JSON"}
    session = scripted_session(CUT)
    client_of(session).post(
        "/v1/chat/completions", json={**body, "messages": [*HELLO, choice["message"], result]}
    )
    prompt = session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)
    assert "<parameter=command>\nrm -rf /home/me\n</parameter>" in prompt


def test_messages() -> None:
    body: dict[str, Any] = {
        "messages": HELLO,
        "max_tokens": 1000,
        "tools": [{"name": "bash", "input_schema": PARAMETERS}],
        "thinking": {"type": "adaptive"},
    }
    message = post("/v1/messages", **body).json()
    assert (message["stop_reason"], message["content"][-1]["input"]) == ("max_tokens", {})
    events = named_events(post("/v1/messages", **body, stream=True))
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == BEGUN
    # Without any argument so far it is not a call without arguments.
    events = named_events(post("/v1/messages", CUT.partition("<parameter")[0], **body, stream=True))
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    with pytest.raises(ValueError):
        json.loads("".join(delta.get("partial_json", "") for delta in deltas))


def test_responses() -> None:
    client = client_of(scripted_session(CUT, bursts=(3,)))
    body: dict[str, Any] = {"input": "hello", "tools": [{"type": "function", **FUNCTION}]}
    response = client.post("/v1/responses", json=body).json()
    *_, made = response["output"]
    assert (response["status"], made["status"], made["arguments"]) == ("incomplete", "incomplete", BEGUN)
    output = {"type": "function_call_output", "call_id": made["call_id"], "output": "error: no JSON"}
    body |= {"previous_response_id": response["id"], "input": [output]}
    assert client.post("/v1/responses", json=body).status_code == 200


def test_custom_tools() -> None:
    text = CUT.replace("=command>", "=input>")
    body: dict[str, Any] = {"input": "hello", "tools": [{"type": "custom", "name": "bash"}]}
    for cut, given in ((text, "rm -rf /home/me"), (text.partition("<parameter")[0], "")):
        *_, made = post("/v1/responses", cut, **body).json()["output"]
        assert (made["type"], made["status"], made["input"]) == ("custom_tool_call", "incomplete", given)
