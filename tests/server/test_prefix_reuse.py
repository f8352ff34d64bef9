"""What coding agents send in consecutive turns, on nano: all but the new tokens come from the cache, and the
server says so; and where something is lost, `/cache/explain` names the place."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from stepflash.assistant.local import open_session
from stepflash.server.app import create_app
from stepflash.settings import EngineSettings, ServerSettings
from tests.server.in_process import Client

BLOCK = 16
MANUAL = "\n".join(
    f"Rule {n}: a file is read before it is changed, and rule {n} is no exception." for n in range(60)
)
HEADER = "x-anthropic-billing-header: cc_version=2.1.332.bc1; cc_entrypoint=sdk-cli; cch={};\n"
BASH = {
    "name": "Bash",
    "description": "Run a command.",
    "input_schema": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"command": {"type": "string"}, "timeout": {"type": "number", "description": "ms"}},
        "required": ["command"],
        "additionalProperties": False,
    },
}
WEB_FETCH = {
    "name": "WebFetch",
    "description": "Fetch a page.",
    "input_schema": {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]},
    "defer_loading": True,
}
MARK = {"type": "ephemeral"}


@pytest.fixture(scope="module")
def nano() -> Iterator[Any]:
    settings = EngineSettings(max_num_seqs=2, kv_cache_gb=0.25)
    with open_session("nano", settings) as local:
        yield local


@pytest.fixture
def client(nano: Any) -> Client:
    return Client(create_app(nano.session, "nano", settings=ServerSettings(), defaults=nano.sampling))


def reversed_keys(value: Any) -> Any:
    """The same JSON with the keys of every object the other way round."""
    if isinstance(value, dict):
        return {key: reversed_keys(inner) for key, inner in reversed(value.items())}
    return [reversed_keys(inner) for inner in value] if isinstance(value, list) else value


def reuse(response: httpx.Response) -> tuple[int, int]:
    """Tokens of the prompt, and those of them that came from the cache."""
    assert response.status_code == 200, response.text
    return int(response.headers["x-stepflash-prompt-tokens"]), int(
        response.headers["x-stepflash-cached-tokens"]
    )


def explained(client: Client, response: httpx.Response) -> dict[str, Any]:
    found = client.get(f"/cache/explain?request_id={response.headers['request-id']}").json()
    (report,) = found["requests"]
    return dict(report)


def check_grown(client: Client, before: httpx.Response, after: httpx.Response) -> None:
    """All of the earlier prompt came from the cache, to the block; the rest is what the client added to it."""
    num_tokens, num_cached = reuse(after)
    assert num_tokens - num_cached < num_tokens - reuse(before)[0] + BLOCK
    report = explained(client, after)
    assert report["kind"] in ("hit", "grown"), report
    assert report["cached_tokens"] == num_cached
    assert report["nearest"]["request_id"] == before.headers["request-id"]


def claude_code(turn: int, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """A request as Claude Code builds it: marks on the last block, a billing header that changes."""
    system = [
        {"type": "text", "text": HEADER.format(f"{turn:05x}")},
        {"type": "text", "text": "You are an agent.", "cache_control": MARK},
        {
            "type": "text",
            "text": f"{MANUAL}\n\nToday's date: 2026-11-25 14:{turn:02d}:07",
            "cache_control": MARK,
        },
    ]
    messages = copy.deepcopy(messages)
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = [{"type": "text", "text": content, "cache_control": MARK}]
    else:
        content[-1]["cache_control"] = MARK
    return {
        "model": "nano",
        "max_tokens": 24,
        "temperature": 0,
        "system": system,
        "messages": messages,
        "tools": tools if turn % 2 == 0 else reversed_keys(tools),
        "thinking": {"type": "adaptive", "display": "omitted"},
        "metadata": {"user_id": json.dumps({"session_id": f"{turn}"})},
    }


def test_two_turns_of_claude_code_share_all_but_the_new_tokens(client: Client) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "<system-reminder>\nNo hurry.\n</system-reminder>"}
    ]
    messages[0]["content"] += "\nWhat is 12 + 30?"
    first = client.post("/v1/messages", json=claude_code(0, messages, [BASH]))
    messages.append({"role": "assistant", "content": first.json()["content"]})
    call = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "echo 42"}}
    messages[-1]["content"] = [*messages[-1]["content"], call]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "42"}
    messages.append({"role": "user", "content": [result]})
    second = client.post("/v1/messages", json=claude_code(1, messages, [BASH]))
    check_grown(client, first, second)
    messages.append({"role": "assistant", "content": second.json()["content"]})
    messages.append({"role": "user", "content": "And plus one?"})
    third = client.post("/v1/messages", json=claude_code(2, messages, [BASH]))
    _, num_cached = reuse(third)
    # A new question takes the thoughts out of the answers before it, so what is shared ends where the first began.
    shared = explained(client, third)["nearest"]["shared_tokens"]
    assert shared >= reuse(first)[0] - BLOCK
    assert shared - num_cached <= BLOCK
    assert third.headers["x-stepflash-cache-miss"] == f"diverged at token {shared}"


def test_a_new_session_shares_tools_and_system_text(client: Client) -> None:
    """The cut behind the head of the prompt: another question, nothing else in common."""
    one = client.post(
        "/v1/messages", json=claude_code(0, [{"role": "user", "content": "Sort 3, 1, 2"}], [BASH])
    )
    other = client.post(
        "/v1/messages", json=claude_code(1, [{"role": "user", "content": "Add 5 to 6"}], [BASH])
    )
    num_tokens, num_cached = reuse(other)
    head = explained(client, other)["nearest"]["shared_tokens"]
    assert head > 1000
    assert head - num_cached <= BLOCK
    assert num_tokens - num_cached < 60
    assert reuse(one)[0] > 1000


def test_a_found_tool_leaves_the_prompt_before_it_as_it_was(client: Client) -> None:
    search = {
        "name": "ToolSearch",
        "description": "Find tools.",
        "input_schema": {"type": "object", "properties": {"query": {"type": "string"}}},
    }
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Fetch the page about prime numbers"}]
    placeholder = {
        "name": "DeferredToolPlaceholder",
        "input_schema": {"type": "object"},
        "defer_loading": True,
    }
    first = client.post("/v1/messages", json=claude_code(0, messages, [BASH, placeholder, search]))
    call = {"type": "tool_use", "id": "toolu_1", "name": "ToolSearch", "input": {"query": "fetch"}}
    messages.append({"role": "assistant", "content": [*first.json()["content"], call]})
    reference = {"type": "tool_reference", "tool_name": "WebFetch"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [reference]}
    messages.append({"role": "user", "content": [result]})
    # The list of tools grows in its middle; none of it is in the head of the prompt.
    tools = [BASH, placeholder, search, WEB_FETCH]
    second = client.post("/v1/messages", json=claude_code(1, messages, tools))
    check_grown(client, first, second)


def test_two_turns_of_codex_share_all_but_the_new_tokens(client: Client) -> None:
    tools = [
        {"type": "function", "name": "exec_command", "strict": False, "parameters": BASH["input_schema"]},
        {"type": "web_search"},
        {
            "type": "namespace",
            "name": "agents",
            "tools": [{"type": "function", "name": "close", "parameters": {}}],
        },
    ]
    user = {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "What is 12 + 30?"}],
    }
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": MANUAL}]}
    items: list[dict[str, Any]] = [developer, user]

    def send(turn: int) -> httpx.Response:
        body = {
            "model": "nano",
            "input": [{**item, "id": f"item_{turn}_{index}"} for index, item in enumerate(items)],
            "tools": tools if turn % 2 == 0 else reversed_keys(tools),
            "max_output_tokens": 24,
            "temperature": 0,
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "one",
        }
        return client.post("/v1/responses", json=body)

    first = send(0)
    items += first.json()["output"]
    call = {
        "type": "function_call",
        "call_id": "call_1",
        "name": "exec_command",
        "arguments": '{"command": "ls"}',
    }
    items += [call, {"type": "function_call_output", "call_id": "call_1", "output": "in.txt"}]
    second = send(1)
    check_grown(client, first, second)


def test_a_stream_tells_what_it_will_reuse(client: Client) -> None:
    body = {
        "model": "nano",
        "messages": [{"role": "user", "content": f"{MANUAL}\nAdd 1 and 2"}],
        "max_tokens": 4,
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    client.post("/v1/chat/completions", json=body)
    response = client.post("/v1/chat/completions", json={**body, **options})
    last = json.loads(response.text.split("data: ")[-2])
    num_tokens, num_cached = reuse(response)
    assert num_cached == last["usage"]["prompt_tokens_details"]["cached_tokens"] > 1000
    assert num_tokens == last["usage"]["prompt_tokens"]
    assert "x-stepflash-cache-miss" not in response.headers


def test_noise_that_is_not_taken_out_is_named(nano: Any) -> None:
    settings = ServerSettings(is_canonical=False)
    client = Client(create_app(nano.session, "nano", settings=settings, defaults=nano.sampling))
    messages = [{"role": "user", "content": "What is 7 + 8?"}]
    client.post("/v1/messages", json=claude_code(0, messages, [BASH]))
    second = client.post("/v1/messages", json=claude_code(2, messages, [BASH]))
    report = explained(client, second)
    assert report["kind"] == "diverged"
    nearest = report["nearest"]
    assert second.headers["x-stepflash-cache-miss"] == f"diverged at token {nearest['diverged_at_token']}"
    assert nearest["text_before"].endswith("cch=0000")
    assert nearest["text_now"].startswith("2;")
    assert nearest["text_earlier"].startswith("0;")
    assert report["cached_tokens"] < BLOCK * 4


def test_a_prompt_can_be_asked_about_before_it_is_sent(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": f"{MANUAL}\nSay it."}]}
    before = client.post("/cache/explain", json=body).json()
    client.post("/v1/chat/completions", json={**body, "max_tokens": 2})
    after = client.post("/cache/explain", json=body).json()
    assert before["computed_tokens"] > 1000 > BLOCK >= after["computed_tokens"]
    assert after["kind"] == "hit"
    assert client.post("/cache/explain", json={}).status_code == 400
    missing = client.get("/cache/explain?request_id=nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
    assert client.get("/cache/explain?limit=" + "9" * 5000).status_code == 400
    assert client.get("/cache/explain?limit=0").status_code == 400
    assert client.get("/cache/explain?limit=x").json()["error"]["param"] == "limit"


def test_clients_do_not_see_each_others_prompts(nano: Any) -> None:
    settings = ServerSettings(api_keys=("one", "two"))
    client = Client(create_app(nano.session, "nano", settings=settings, defaults=nano.sampling))
    body = {"messages": [{"role": "user", "content": f"{MANUAL}\nA secret."}], "max_tokens": 2}
    for key in ("one", "two"):
        client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
    seen = {
        key: client.get("/cache/explain", headers={"authorization": f"Bearer {key}"}).json()["requests"]
        for key in ("one", "two")
    }
    assert [len(reports) for reports in seen.values()] == [1, 1]
    assert seen["two"][0]["nearest"] is None
    # The cache itself is shared, and it is said that somebody else filled it.
    assert seen["two"][0]["cached_tokens"] > 1000
    assert client.get("/cache/explain").status_code == 401
