"""The Responses API end to end over HTTP, with a scripted engine behind it."""

import asyncio
import itertools
import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.errors import EngineError, PromptTooLong, QueueFull
from stepflash.server.app import create_app
from stepflash.server.openai_responses_decode import ResponsesBody
from stepflash.server.openai_responses_encode import ResponseEncoder, ResponseHead
from stepflash.server.openai_responses_store import ResponseStore, StoredResponse
from stepflash.settings import ServerSettings
from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.in_process import client_of, named_events

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
AGENTS = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Agents",
    "tools": [
        {"type": "function", "name": "close_agent", "parameters": {"type": "object", "properties": {}}},
        {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}},
    ],
}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files",
    "format": {
        "type": "grammar",
        "syntax": "lark",
        "definition": 'start: "*** Begin" ("\\n" LINE)*\nLINE: /[^\\n]*/',
    },
}
ANSWER = "Let me think\n</think>\nHi there" + END


def call(name: str, **arguments: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def post(session: Any, **body: Any) -> httpx.Response:
    return client_of(session).post("/v1/responses", json={"model": "scripted", "input": "hello", **body})


def reply(text: str, **body: Any) -> dict[str, Any]:
    response = post(scripted_session(text, bursts=[3]), **body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(**body: Any) -> str:
    session = scripted_session(ANSWER, max_context_tokens=20_000)
    response = post(session, **body)
    assert response.status_code == 200, response.text
    return session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)


# Replies


def test_a_whole_response() -> None:
    response = reply(ANSWER, instructions="Be brief.", temperature=0.5, metadata={"a": "b"})
    assert response["object"] == "response"
    assert (response["status"], response["error"], response["incomplete_details"]) == (
        "completed",
        None,
        None,
    )
    thought, message = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Let me think"}]
    assert (thought["type"], thought["summary"], thought["status"]) == ("reasoning", [], "completed")
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    (part,) = message["content"]
    assert (part["type"], part["text"], part["annotations"]) == ("output_text", "Hi there", [])
    usage = response["usage"]
    assert usage["output_tokens"] == 24
    assert usage["output_tokens_details"]["reasoning_tokens"] == 14
    assert usage["input_tokens_details"]["cached_tokens"] == 1
    assert usage["total_tokens"] == usage["input_tokens"] + 24
    echoed = {
        key: response[key] for key in ("instructions", "temperature", "metadata", "tool_choice", "tools")
    }
    assert echoed == {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "metadata": {"a": "b"},
        "tool_choice": "auto",
        "tools": [],
    }


def test_the_events_of_a_stream() -> None:
    text = "hm\n</think>\nSure." + call("weather", city="Oslo", days="2") + "bye" + END
    events = named_events(post(scripted_session(text, bursts=[500]), tools=[WEATHER], stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text_item = [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    reasoning_item = [name.replace("output_text", "reasoning_text") for name in text_item]
    call_item = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    names = ["created", "in_progress", *reasoning_item, *text_item, *call_item, *text_item, "completed"]
    assert [event["type"] for event in events] == [f"response.{name}" for name in names]
    indices = [event["output_index"] for event in events if "output_index" in event]
    assert indices == [0] * 6 + [1] * 6 + [2] * 4 + [3] * 6
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == events[-1]["response"]["output"]
    for index, group in itertools.groupby(events[2:-1], lambda event: event["output_index"]):
        ids = {event.get("item_id") or event["item"]["id"] for event in group}
        assert ids == {items[index]["id"]}
    assert json.loads(items[2]["arguments"]) == {"city": "Oslo", "days": 2}
    assert items[2]["call_id"].startswith("call_")
    assert [part["text"] for item in (items[1], items[3]) for part in item["content"]] == ["Sure.", "bye"]


def test_a_cut_answer_is_incomplete() -> None:
    events = named_events(post(scripted_session("a</think>bcd" + END), max_output_tokens=3, stream=True))
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete"
    assert (response["status"], response["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    whole = reply("a</think>bcd" + END, max_output_tokens=3)
    assert whole["status"] == "incomplete"


# Tools


def test_a_function_inside_a_namespace_is_called_by_both_names() -> None:
    text = (
        "t\n</think>\n"
        + call("close_agent")
        + call("multi_agent_v1.weather")
        + call("weather", city="Oslo")
        + END
    )
    calls = reply(text, tools=[WEATHER, AGENTS, {"type": "web_search"}])["output"][1:]
    assert [(item["name"], item.get("namespace")) for item in calls] == [
        ("close_agent", "multi_agent_v1"),
        ("weather", "multi_agent_v1"),
        ("weather", None),
    ]


def test_tools_in_the_prompt() -> None:
    prompt = prompt_of(tools=[WEATHER, AGENTS, {"type": "web_search"}, PATCH])
    lines = prompt.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    functions = [json.loads(line)["function"] for line in lines]
    assert [function["name"] for function in functions] == [
        "weather",
        "close_agent",
        "multi_agent_v1.weather",
        "apply_patch",
    ]
    assert functions[0] == {key: WEATHER[key] for key in ("name", "description", "parameters")}
    assert list(functions[3]["parameters"]["properties"]) == ["input"]
    assert 'start: "*** Begin"' in functions[3]["description"]


def test_a_custom_tool_gets_free_text() -> None:
    patch = '*** Begin\n+ "quoted" \\ \u65e5\n\n<x>'
    text = "t\n</think>\n" + call("apply_patch", input=patch) + END
    events = named_events(post(scripted_session(text), tools=[PATCH], stream=True))
    item = events[-1]["response"]["output"][1]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", patch)
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == patch
    history = [
        {"role": "user", "content": "patch"},
        item,
        {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "done"},
    ]
    prompt = prompt_of(input=history, tools=[PATCH])
    assert f"<parameter=input>\n{patch}\n</parameter>" in prompt
    assert "<tool_response>done</tool_response>" in prompt


def test_no_tools_and_one_call_at_a_time() -> None:
    assert "# Tools" not in prompt_of(tools=[WEATHER], tool_choice="none")
    calls = "t\n</think>\n" + call("weather") * 2 + END
    assert len(reply(calls, tools=[WEATHER], parallel_tool_calls=False)["output"]) == 2


# Prompts


def test_a_task_of_several_turns() -> None:
    items = [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "You are Codex."}],
        },
        {"role": "developer", "content": "Skills: none."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "close it"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I should"}],
            "encrypted_content": None,
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Closing."}]},
        {
            "type": "function_call",
            "name": "weather",
            "namespace": "multi_agent_v1",
            "arguments": '{"x": true}',
            "call_id": "c1",
        },
        {
            "type": "function_call",
            "name": "close_agent",
            "namespace": "multi_agent_v1",
            "arguments": "",
            "call_id": "c2",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "closed"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "gone"}, {"type": "input_image", "image_url": "data:"}],
        },
    ]
    prompt = prompt_of(input=items, tools=[WEATHER, AGENTS])
    assert "<|im_start|>system\nYou are Codex.\n\n# Tools" in prompt
    assert (
        "<|im_end|>\n<|im_start|>system\nSkills: none.<|im_end|>\n<|im_start|>user\nclose it<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nI should\n</think>\nClosing.<tool_call>\n<function=multi_agent_v1.weather>\n"
        "<parameter=x>\nTrue\n</parameter>\n</function>\n</tool_call><tool_call>\n<function=close_agent>\n"
    ) in prompt
    assert "<tool_response>closed</tool_response><tool_response>gone[input_image left out" in prompt


def test_what_a_response_held_is_rendered_as_the_model_wrote_it() -> None:
    """The prompt of the next turn begins with this turn's prompt and output, so the cache holds all of it."""
    text = "hm\n</think>\nSure." + call("weather", city="Oslo") + END
    session = scripted_session(text, ANSWER, bursts=[7], max_context_tokens=20_000)
    client = client_of(session)
    first = client.post("/v1/responses", json={"input": "hello", "tools": [WEATHER]}).json()
    output = {"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "rain"}
    history = [{"role": "user", "content": "hello"}, *first["output"], output]
    stateless = {"input": history, "tools": [WEATHER], "store": False}
    stored = {"input": [output], "tools": [WEATHER], "previous_response_id": first["id"]}
    for body in (stateless, stored):
        assert client.post("/v1/responses", json=body).status_code == 200
    prompts = [session.tokenizer.decode(r.prompt_token_ids) for r in engine_of(session).requests]
    assert prompts[1].startswith(prompts[0] + text)
    assert prompts[2] == prompts[1]


def test_thinking_can_be_switched_off() -> None:
    for effort in ("none", "minimal"):
        assert prompt_of(reasoning={"effort": effort}).endswith("<think>\n\n</think>\n")
    for reasoning in ({"effort": "high"}, {"summary": "auto"}, None):
        assert prompt_of(reasoning=reasoning).endswith("<think>\n")


def test_sampling_parameters_reach_the_engine() -> None:
    session = scripted_session(ANSWER)
    post(session, temperature=0.5, top_p=0.9, max_output_tokens=7)
    sampling = engine_of(session).requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 7)


# Stored responses


def test_a_stored_response_can_be_read_continued_and_deleted() -> None:
    client = client_of(scripted_session(ANSWER))
    first = client.post("/v1/responses", json={"input": "hello"}).json()
    path = f"/v1/responses/{first['id']}"
    assert client.get(path).json() == first
    second = client.post("/v1/responses", json={"input": "and?", "previous_response_id": first["id"]}).json()
    assert second["previous_response_id"] == first["id"]
    items = client.get(f"/v1/responses/{second['id']}/input_items?order=asc").json()["data"]
    assert [item["type"] for item in items] == ["message", "reasoning", "message", "message"]
    assert client.post(f"{path}/cancel").status_code == 400
    assert client.delete(path).json()["deleted"] is True
    for response in (client.get(path), client.delete(path), client.post(f"{path}/cancel")):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_input_items_are_listed_in_pages() -> None:
    client = client_of(scripted_session(ANSWER))
    items = [{"role": "user", "content": f"message {number}"} for number in range(25)]
    stored = client.post("/v1/responses", json={"input": items}).json()

    def page(**query: Any) -> Any:
        response = client.get(f"/v1/responses/{stored['id']}/input_items", params=query)
        return response.json() if response.status_code == 200 else response.json()["error"]["param"]

    def numbers(listed: Any) -> list[int]:
        return [int(item["content"][0]["text"].split()[1]) for item in listed["data"]]

    first = page()
    assert (numbers(first), first["has_more"]) == (list(range(24, 4, -1)), True)
    rest = page(after=first["last_id"])
    assert (numbers(rest), rest["has_more"]) == ([4, 3, 2, 1, 0], False)
    assert numbers(page(order="asc", limit=2, after=rest["last_id"])) == [1, 2]
    assert page(after=rest["last_id"])["data"] == []
    assert [page(order="up"), page(limit=0), page(limit="x"), page(after="nobody")] == [
        "order",
        "limit",
        "limit",
        "after",
    ]


def test_a_response_is_its_own_key_s() -> None:
    client = client_of(scripted_session(ANSWER), api_keys=("one", "two"))
    mine, theirs = {"x-api-key": "one"}, {"x-api-key": "two"}
    first = client.post("/v1/responses", json={"input": "hello"}, headers=mine).json()
    path = f"/v1/responses/{first['id']}"
    for response in (
        client.get(path, headers=theirs),
        client.get(f"{path}/input_items", headers=theirs),
        client.post(f"{path}/cancel", headers=theirs),
        client.delete(path, headers=theirs),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    body = {"input": "and?", "previous_response_id": first["id"]}
    assert client.post("/v1/responses", json=body, headers=theirs).status_code == 400
    assert client.post("/v1/responses", json=body, headers=mine).status_code == 200
    assert client.get(path, headers=mine).json() == first


def test_a_streamed_response_is_stored_and_store_false_is_not() -> None:
    client = client_of(scripted_session(ANSWER))
    final = named_events(client.post("/v1/responses", json={"input": "x", "stream": True}))[-1]["response"]
    assert client.get(f"/v1/responses/{final['id']}").json() == final
    other = client.post("/v1/responses", json={"input": "x", "store": False}).json()
    assert client.get(f"/v1/responses/{other['id']}").status_code == 404
    again = client.post("/v1/responses", json={"input": "x", "previous_response_id": other["id"]})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "previous_response_not_found")


def test_the_store_keeps_the_most_recently_used() -> None:
    def stored(name: str) -> StoredResponse:
        return StoredResponse(response={"id": name, "output": []}, items=(), num_bytes=40, owner="me")

    by_number, by_bytes = ResponseStore(max_responses=2), ResponseStore(max_bytes=100)
    for store in (by_number, by_bytes):
        store.put(stored("a"))
        store.put(stored("b"))
        assert store.get("a", "me") is not None
        store.put(stored("c"))
        assert [store.get(name, "me") is not None for name in "abc"] == [True, False, True]
        store.delete("a", "me")
        store.put(stored("d"))
        assert [store.get(name, "me") is not None for name in "acd"] == [False, True, True]


def test_a_running_response_can_be_cancelled() -> None:
    session = scripted_session("word " * 1000, pause=0.01)
    app = create_app(
        session, "scripted", settings=ServerSettings(api_keys=("one", "two"), max_requests_per_client=1)
    )

    async def run() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        transport, mine = httpx.ASGITransport(app), {"x-api-key": "one"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=mine) as client:
            body = {"input": "hello", "stream": True}
            streaming = asyncio.create_task(client.post("/v1/responses", json=body))
            while not engine_of(session).requests:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            (response_id,) = _running_ids(app)
            seen = await client.get(f"/v1/responses/{response_id}")
            theirs = {"x-api-key": "two"}
            assert (await client.get(f"/v1/responses/{response_id}", headers=theirs)).status_code == 404
            cancel = await client.post(f"/v1/responses/{response_id}/cancel", headers=theirs)
            assert cancel.status_code == 404
            cancelled = await client.post(f"/v1/responses/{response_id}/cancel")
            last = named_events(await streaming)[-1]
            again = await client.post(f"/v1/responses/{response_id}/cancel")
            assert (again.status_code, again.json()) == (200, last["response"])
            return seen.json(), cancelled.json(), last

    seen, cancelled, last = asyncio.run(asyncio.wait_for(run(), 30))
    assert (seen["status"], cancelled["status"], last["response"]["status"]) == (
        "in_progress",
        "cancelled",
        "cancelled",
    )
    assert last["type"] == "response.incomplete"
    assert seen["id"] == cancelled["id"] == last["response"]["id"]


def _running_ids(app: Any) -> list[str]:
    """Over HTTP a client learns the id from the stream, which this transport gives only at its end."""
    (create,) = [route.endpoint for route in app.routes if getattr(route, "path", "") == "/v1/responses"]
    return list(create.__self__._running)


def test_events_keep_a_silent_stream_alive() -> None:
    encoder = ResponseEncoder(ResponseHead(id="resp_1", created_at=0, model="m"), lambda token_id: b"")
    events = [*encoder.start(), encoder.keep_alive(), encoder.keep_alive()]
    assert [event["type"] for event in events[1:]] == ["response.in_progress"] * 3
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3]


def test_silence_is_filled_with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepflash.server.openai_responses_routes.KEEP_ALIVE_SECONDS", 0.05)
    events = named_events(post(scripted_session(ANSWER, bursts=[100], pause=0.4), stream=True))
    assert sum(event["type"] == "response.in_progress" for event in events) > 2
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


# Errors


ERRORS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "model"),
    ({"input": []}, 400, "input"),
    ({"input": 3}, 400, "input"),
    ({"input": ["x"]}, 400, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, 400, "input[0].role"),
    ({"input": [{"role": "user"}]}, 400, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type"),
    (
        {"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{]"}]},
        400,
        "input[0].arguments",
    ),
    ({"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, 400, "input[0].name"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, 400, "input[0].call_id"),
    ({"max_output_tokens": -1}, 400, "max_output_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"tools": {}}, 400, "tools"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": "x"}]}, 400, "tools[0].parameters"),
    ({"tools": [{"type": "namespace", "name": "n"}]}, 400, "tools[0]"),
    ({"tools": [WEATHER, WEATHER]}, 400, "tools[1]"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, 400, "tool_choice"),
    ({"reasoning": {"effort": "huge"}}, 400, "reasoning.effort"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, 400, "text.format.schema"),
    ({"background": True}, 400, "background"),
    ({"conversation": "c"}, 400, "conversation"),
    ({"prompt": {"id": "p"}}, 400, "prompt"),
    ({"top_logprobs": 21}, 400, "top_logprobs"),
    ({"previous_response_id": "resp_x"}, 400, "previous_response_id"),
]


@pytest.mark.parametrize(("body", "status", "param"), ERRORS)
def test_errors_name_the_field(body: dict[str, Any], status: int, param: str) -> None:
    response = post(scripted_session(ANSWER), **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error


@pytest.mark.parametrize(
    "body",
    [
        {"include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "client_metadata": {"a": 1}},
        {"truncation": "auto", "max_tool_calls": 3, "user": "u", "unknown": [1], "stream_options": {}},
        {
            "text": {"verbosity": "medium"},
            "top_logprobs": 0,
            "tools": [{"type": "web_search"}, {"type": "mcp"}],
        },
        {"instructions": None, "tools": None, "store": None, "background": False},
    ],
)
def test_harmless_fields_are_accepted(body: dict[str, Any]) -> None:
    assert prompt_of(**body) == prompt_of()


def test_a_prompt_that_does_not_fit() -> None:
    response = post(scripted_session("x", max_context_tokens=20), stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_an_engine_error_before_and_in_a_stream() -> None:
    session = scripted_session("abcdef", error="NaN logits", error_after=3)
    assert post(session).status_code == 500
    last = named_events(post(session, stream=True))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "NaN logits"}


def test_codes_of_failures_in_a_stream() -> None:
    encoder = ResponseEncoder(ResponseHead(id="resp_1", created_at=0, model="m"), lambda token_id: b"")
    errors = [encoder.fail(error)["response"]["error"] for error in (PromptTooLong(9, 5), EngineError("x"))]
    assert [error["code"] for error in errors] == ["context_length_exceeded", "server_error"]
    queue_full = encoder.fail(QueueFull("too many", 1.5))["response"]["error"]
    assert queue_full["code"] == "rate_limit_exceeded"
    # The form in which Codex reads the time to wait.
    assert re.search(r"try again in 1\.5s", queue_full["message"])


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
KEYS = [
    "role",
    "content",
    "type",
    "text",
    "name",
    "arguments",
    "output",
    "call_id",
    "input",
    "tools",
    "namespace",
]
KINDS = st.sampled_from(
    [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "function",
        "custom",
        "namespace",
        "input_text",
        "user",
    ]
)
ANYTHING = st.recursive(
    SCALARS | KINDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=10,
)


@settings(max_examples=80)
@given(
    items=ANYTHING,
    fields=st.dictionaries(
        st.sampled_from(sorted(set(ResponsesBody.model_fields) - {"input"})), ANYTHING, max_size=4
    ),
)
def test_no_body_is_a_server_error(items: Any, fields: dict[str, Any]) -> None:
    client = client_of(scripted_session(ANSWER, bursts=[50]))
    response = client.post("/v1/responses", content=json.dumps({"input": items, **fields}).encode())
    assert response.status_code in (200, 400, 404), response.text
    assert response.status_code == 200 or response.json()["error"]["message"]
