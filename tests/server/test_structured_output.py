"""Structured output and limits of thoughts over HTTP, in all three APIs: what reaches the engine, what comes back,
what is refused. The scripted engine keeps to the constraint of each request, the micro model is a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from stepflash.assistant.budget import CLOSING_TEXT, EFFORT_TOKENS, limit_of
from stepflash.assistant.local import open_session
from stepflash.assistant.session import Session
from stepflash.settings import EngineSettings
from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.in_process import client_of, named_events

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "wind": {"type": "boolean"},
    },
    "required": ["city", "days", "wind"],
    "additionalProperties": False,
}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
APIS = pytest.mark.parametrize("api", list(PATHS))
WHOLE_AND_STREAMED = pytest.mark.parametrize("stream", [False, True])


def body_of(api: str, schema: Any = None, tool_choice: str | None = None, **more: Any) -> dict[str, Any]:
    """The same request in the words of each API: an answer of a schema, or calls of the tool `weather`."""
    strict = {"name": "weather", "strict": True}
    match api:
        case "chat":
            body: dict[str, Any] = {"messages": HELLO}
            if schema is not None:
                form = {"name": "n", "schema": schema, "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": form}
            if tool_choice:
                body["tools"] = [{"type": "function", "function": {**strict, "parameters": SCHEMA}}]
                body["tool_choice"] = {"auto": "auto", "any": "required"}.get(
                    tool_choice, {"type": "function", "function": {"name": "weather"}}
                )
        case "responses":
            body = {"input": HELLO}
            if schema is not None:
                body["text"] = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
            if tool_choice:
                body["tools"] = [{"type": "function", **strict, "parameters": SCHEMA}]
                named = {"type": "function", "name": "weather"}
                body["tool_choice"] = {"auto": "auto", "any": "required"}.get(tool_choice, named)
        case _:
            body = {"messages": HELLO, "max_tokens": 1000, "thinking": {"type": "adaptive"}}
            if schema is not None:
                body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
            if tool_choice:
                body["tools"] = [{**strict, "input_schema": SCHEMA}]
                named = {"type": "tool", "name": "weather"}
                body["tool_choice"] = {"auto": {"type": "auto"}, "any": {"type": "any"}}.get(
                    tool_choice, named
                )
    return {**body, **more}


def post(session: Session, api: str, body: dict[str, Any]) -> httpx.Response:
    return client_of(session).post(PATHS[api], json=body)


def read(api: str, response: httpx.Response) -> tuple[str | None, list[dict[str, Any]], dict[str, Any]]:
    """Text, arguments of the calls and details of the usage, from a whole reply or a streamed one."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        return read_stream(api, response)
    reply = response.json()
    if api == "chat":
        message = reply["choices"][0]["message"]
        calls = [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls") or []]
        return message["content"], calls, reply["usage"]["completion_tokens_details"]
    parts = reply["output" if api == "responses" else "content"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    texts += [part["content"][0]["text"] for part in parts if part["type"] == "message"]
    calls = [json.loads(part["arguments"]) for part in parts if part["type"] == "function_call"]
    calls += [part["input"] for part in parts if part["type"] == "tool_use"]
    return "".join(texts) or None, calls, reply["usage"]["output_tokens_details"]


def read_stream(
    api: str, response: httpx.Response
) -> tuple[str | None, list[dict[str, Any]], dict[str, Any]]:
    if api == "chat":
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        calls: dict[int, str] = {}
        for call in (call for delta in deltas for call in delta.get("tool_calls") or []):
            calls[call["index"]] = calls.get(call["index"], "") + call["function"].get("arguments", "")
        text = "".join(delta.get("content") or "" for delta in deltas)
        details = chunks[-1]["usage"]["completion_tokens_details"]
        return text or None, [json.loads(arguments) for arguments in calls.values()], details
    events = named_events(response)
    if api == "responses":
        whole = events[-1]["response"]
    else:
        from stepflash.server.anthropic_encode import fold_message

        whole = fold_message(events)
    return read(api, httpx.Response(200, json=whole))


@pytest.fixture(scope="module")
def micro() -> Iterator[Session]:
    with open_session(str(MICRO), EngineSettings(max_num_seqs=4, max_model_len=2048)) as local:
        yield local.session


# A real model: random weights, so that only the grammar makes sense of what it says


@APIS
@WHOLE_AND_STREAMED
@pytest.mark.parametrize("wanted", ["schema", "any", "named"])
def test_a_model_without_sense_gives_valid_answers(
    micro: Session, api: str, stream: bool, wanted: str
) -> None:
    """Not thinking, because thoughts of random weights do not end."""
    body = body_of(api, SCHEMA if wanted == "schema" else None, None if wanted == "schema" else wanted)
    match api:
        case "chat":
            body |= {"reasoning_effort": "none", "max_tokens": 400, "stream_options": {"include_usage": True}}
        case "responses":
            body |= {"reasoning": {"effort": "none"}, "max_output_tokens": 400}
        case _:
            body |= {"thinking": {"type": "disabled"}}
    if api != "responses":
        body |= {"parallel_tool_calls": False} if api == "chat" else {}
    if wanted == "any" and api == "messages":
        body["tool_choice"]["disable_parallel_tool_use"] = True
    if api == "responses":
        body["parallel_tool_calls"] = False
    if not stream:
        body.pop("stream_options", None)
    text, calls, _ = read(api, post(micro, api, {**body, "temperature": 1.0, "stream": stream}))
    values = [json.loads(text)] if text is not None else calls
    assert (text is None) == (wanted != "schema")
    assert len(values) == 1
    jsonschema.validate(values[0], SCHEMA)


def test_the_same_seed_gives_the_same_answer_with_and_without_drafts(micro: Session) -> None:
    answers = set()
    for depth in (0, 1, 3):
        body = body_of("chat", SCHEMA, reasoning_effort="none", draft_depth=depth, seed=4, temperature=0.8)
        answers.add(read("chat", post(micro, "chat", body))[0])
    assert len(answers) == 1


def test_several_choices_each_keep_to_the_format(micro: Session) -> None:
    body = body_of("chat", {"enum": ["red", "green", "blue"]}, reasoning_effort="none", n=4, temperature=1.5)
    choices = post(micro, "chat", body).json()["choices"]
    assert {json.loads(choice["message"]["content"]) for choice in choices} <= {"red", "green", "blue"}


def test_text_completions_keep_to_a_format(micro: Session) -> None:
    body = {"prompt": "x", "max_tokens": 50, "structured_outputs": {"choice": ["yes", "no \u00e9"]}}
    reply = client_of(micro).post("/v1/completions", json=body).json()
    assert reply["choices"][0]["text"] in ("yes", "no \u00e9")


# Every schema is fine on its own; where an object begins, all of their properties are possible at once.
TOO_MUCH = {
    "anyOf": [
        {"type": "object", "properties": {f"k{j}": {"type": "string", "maxLength": i + j} for j in range(30)}}
        for i in range(100)
    ]
}


@APIS
@WHOLE_AND_STREAMED
def test_a_grammar_that_grows_too_large_is_the_error_of_its_request(
    micro: Session, api: str, stream: bool
) -> None:
    """Found out when the answer is on its way: told as any wrong request is, and others do not notice."""
    off = {
        "chat": {"reasoning_effort": "none"},
        "responses": {"reasoning": {"effort": "none"}},
        "messages": {"thinking": {"type": "disabled"}},
    }[api]
    param = {
        "chat": "response_format.json_schema.schema",
        "responses": "text.format.schema",
        "messages": "output_config.format.schema",
    }[api]
    client = client_of(micro)
    good = {"prompt": "x", "max_tokens": 40, "temperature": 0}
    alone = client.post("/v1/completions", json=good).json()["choices"]

    async def main() -> list[httpx.Response]:
        asked = [("/v1/completions", good), (PATHS[api], body_of(api, TOO_MUCH, stream=stream, **off))]
        return list(await asyncio.gather(*(client._request("POST", path, json=body) for path, body in asked)))

    other, failed = asyncio.run(main())
    assert other.json()["choices"] == alone
    message = f"{param}: the grammar cannot go on: Parser Error: Current row has"
    if not stream:
        assert failed.status_code == 400
        error = failed.json()["error"]
    else:
        assert failed.status_code == 200
        frames = [part.partition("data: ") for part in failed.text.strip().split("\n\n")]
        if api == "chat":
            assert frames.pop()[2] == "[DONE]"
        last = json.loads(frames[-1][2])
        if api == "responses":
            assert last["type"] == "response.failed"
            assert last["response"]["status"] == "failed"
            error = last["response"]["error"]
            assert error["code"] == "invalid_prompt"
        else:
            assert frames[-1][0] == ("event: error\n" if api == "messages" else "")
            error = last["error"]
    assert error["message"].startswith(message), error
    assert "<state>" not in error["message"]
    if api != "responses" or not stream:
        assert error["type"] == "invalid_request_error"
    if api == "chat" or (api == "responses" and not stream):
        assert (error["param"], error["code"]) == (param, "grammar_failed")


# The thought comes first

JSON_TEXT = '{"city": "Oslo", "days": 3, "wind": true}'
CALL_TEXT = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=wind>\nTrue\n</parameter>\n</function>\n</tool_call>"
)
ARGUMENTS = {"city": "Oslo", "days": 3, "wind": True}


def scripted(api: str, text: str, body: dict[str, Any], stream: bool) -> httpx.Response:
    if stream and api == "chat":
        body = {**body, "stream_options": {"include_usage": True}}
    return post(scripted_session(text, bursts=[3, 1]), api, {**body, "stream": stream})


@APIS
@WHOLE_AND_STREAMED
def test_the_model_thinks_before_an_answer_of_a_schema(api: str, stream: bool) -> None:
    text = f"Some {{thought}}\n</think>\n{JSON_TEXT}{END}"
    content, calls, _ = read(api, scripted(api, text, body_of(api, SCHEMA), stream))
    assert (content, calls) == (JSON_TEXT, [])


@APIS
@WHOLE_AND_STREAMED
@pytest.mark.parametrize("choice", ["any", "named", "auto"])
def test_the_model_thinks_before_a_demanded_call(api: str, stream: bool, choice: str) -> None:
    text = f"Some {{thought}}\n</think>\n{CALL_TEXT}{END}"
    content, calls, _ = read(api, scripted(api, text, body_of(api, tool_choice=choice), stream))
    assert (content, calls) == (None, [ARGUMENTS])


@APIS
@pytest.mark.parametrize("answer", ["Hello", CALL_TEXT.replace("\n3\n", "\nthree\n"), "", JSON_TEXT])
def test_demanded_calls_allow_nothing_else(api: str, answer: str) -> None:
    text = f"Thought\n</think>\n{answer}{END}"
    assert post(scripted_session(text), api, body_of(api, tool_choice="any")).status_code == 500
    assert "the constraint" in post(scripted_session(text), api, body_of(api, tool_choice="named")).text


@APIS
def test_an_old_end_of_a_thought_in_the_prompt_triggers_nothing(api: str) -> None:
    body = body_of(api, SCHEMA)
    history = [
        {"role": "user", "content": "What is </think>?"},
        {"role": "assistant", "content": "A tag: </think>"},
        {"role": "user", "content": "And </think> now?"},
    ]
    body["input" if api == "responses" else "messages"] = history
    text = f"Not JSON\n</think>\n{JSON_TEXT}{END}"
    assert read(api, post(scripted_session(text), api, body))[0] == JSON_TEXT


def test_tags_in_an_answer_of_a_schema_are_text() -> None:
    """Also without a thought, where a model may otherwise begin one."""
    text = json.dumps({"a": "<think>x</think>"})
    body = body_of("chat", {"type": "object"}, reasoning_effort="none")
    # Spelled out: the tokens of the tags are not part of any answer.
    session = scripted_session(text.replace("think>", "thin>") + END)
    assert read("chat", post(session, "chat", body))[0] == text.replace("think>", "thin>")


@APIS
def test_with_tools_an_answer_of_a_schema_may_be_a_call(api: str) -> None:
    body = body_of(api, SCHEMA, "auto")
    for answer, expected in ((CALL_TEXT, (None, [ARGUMENTS])), (JSON_TEXT, (JSON_TEXT, []))):
        text = f"t\n</think>\n{answer}{END}"
        assert read(api, post(scripted_session(text), api, body))[:2] == expected


FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"any": [1]}', "[1]"),
    ({"response_format": {"type": "regex", "pattern": "[0-9]{3}"}}, "123", "12a"),
    (
        {"response_format": {"type": "grammar", "syntax": "lark", "definition": 'start: "a" "b"?'}},
        "ab",
        "abb",
    ),
    ({"response_format": {"type": "grammar", "syntax": "regex", "definition": "x+"}}, "xx", "xy"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "maybe"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON_TEXT, "{}"),
    ({"structured_outputs": {"grammar": 'start: "a"+'}}, "aaa", "b"),
]


@pytest.mark.parametrize(("form", "good", "bad"), FORMS, ids=[str(form) for form, _, _ in FORMS])
def test_other_forms_of_answers(form: dict[str, Any], good: str, bad: str) -> None:
    for text, status in ((good, 200), (bad, 500)):
        session = scripted_session(f"t\n</think>\n{text}{END}")
        assert post(session, "chat", {"messages": HELLO, **form}).status_code == status


def test_the_freeform_tool_of_the_responses_api_keeps_to_its_grammar() -> None:
    definition = 'start: "*** Begin" ("\\n" LINE)*\nLINE: /[^\\n]+/'
    tool = {
        "type": "custom",
        "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": definition},
    }

    def answer(patch: str, **more: Any) -> httpx.Response:
        call = f"<function=apply_patch>\n<parameter=input>\n{patch}\n</parameter>\n</function>\n</tool_call>"
        session = scripted_session(f"t\n</think>\nNow:\n<tool_call>\n{call}{END}")
        return post(session, "responses", {"input": "go", "tools": [tool], **more})

    item = answer("*** Begin\n+x").json()["output"][-1]
    assert (item["type"], item["input"]) == ("custom_tool_call", "*** Begin\n+x")
    assert answer("+x").status_code == 500
    demanded = answer("*** Begin\n+x", tool_choice={"type": "custom", "name": "apply_patch"})
    assert "the constraint dictates '<tool_call>" in demanded.text


# Refused before anything runs

SCHEMA_ERRORS: list[tuple[Any, str]] = [
    (5, "schema"),
    ({"type": "strin"}, "strin"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "string", "pattern": "a("}, "unclosed"),
    ({"$ref": "#/nowhere"}, "nowhere"),
]
SCHEMA_PATHS = {
    "chat": "response_format.json_schema.schema",
    "responses": "text.format.schema",
    "messages": "output_config.format.schema",
}


@APIS
@pytest.mark.parametrize(("schema", "problem"), SCHEMA_ERRORS, ids=str)
def test_a_wrong_schema_is_refused(api: str, schema: Any, problem: str) -> None:
    session = scripted_session("never")
    response = post(session, api, body_of(api, schema))
    message = response.json()["error"]["message"]
    assert response.status_code == 400
    assert message.startswith(f"{SCHEMA_PATHS[api]}: ")
    assert problem in message
    if api != "messages":
        assert response.json()["error"]["param"] == SCHEMA_PATHS[api]
    assert not engine_of(session).requests


@APIS
def test_a_strict_tool_that_cannot_be_enforced_is_refused(api: str) -> None:
    body = body_of(api, tool_choice="auto")
    tool = body["tools"][0].get("function", body["tools"][0])
    key = "input_schema" if api == "messages" else "parameters"
    tool[key] = {"type": "object", "properties": {"x": {"type": "array", "contains": {}}}}
    response = post(scripted_session("never"), api, body)
    path = {"chat": "tools[0].function.parameters", "responses": "tools[0].parameters"}.get(
        api, "tools.0.input_schema"
    )
    assert response.status_code == 400
    assert f"{path}.properties.x: " in response.json()["error"]["message"]


CHAT_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "regex"}}, "response_format.pattern"),
    ({"response_format": {"type": "grammar", "syntax": "ebnf"}}, "response_format.syntax"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
    ({"thinking": {"task_budget_tokens": "many"}}, "thinking.task_budget_tokens"),
]


@pytest.mark.parametrize(("body", "param"), CHAT_ERRORS, ids=str)
def test_errors_name_the_field(body: dict[str, Any], param: str) -> None:
    response = post(scripted_session("never"), "chat", {"messages": HELLO, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


# Limits of thoughts


@APIS
@WHOLE_AND_STREAMED
def test_a_cut_thought_is_told_in_the_usage(api: str, stream: bool) -> None:
    body = body_of(api, max_thinking_tokens=10)
    text = f"A thought that is too long\n</think>\nAnswer{END}"
    content, _, details = read(api, scripted(api, text, body, stream))
    assert content == "Answer"
    assert details["thinking_budget_tokens"] == 10
    assert details["thinking_cut"] == "budget"
    counted = details["thinking_tokens" if api == "messages" else "reasoning_tokens"]
    assert counted == 10 + len(CLOSING_TEXT) + 1


@APIS
def test_a_thought_in_circles_is_cut(api: str) -> None:
    text = f"{'Wait, no. ' * 60}\n</think>\nAnswer{END}"
    content, _, details = read(api, post(scripted_session(text), api, body_of(api)))
    assert (content, details["thinking_cut"]) == ("Answer", "loop")
    kept = post(scripted_session(text), api, body_of(api, stop_thinking_loops=False))
    assert read(api, kept)[2]["thinking_cut"] is None


@APIS
@pytest.mark.parametrize("effort", list(EFFORT_TOKENS))
def test_levels_of_effort_are_budgets(api: str, effort: str) -> None:
    named = {
        "chat": {"reasoning_effort": effort},
        "responses": {"reasoning": {"effort": effort}},
        "messages": {"output_config": {"effort": effort}},
    }
    session = scripted_session(f"Answer{END}")
    post(session, api, body_of(api, **named[api]))
    (request,) = engine_of(session).requests
    thinks = session.tokenizer.decode(request.prompt_token_ids).endswith("<think>\n")
    assert thinks == (EFFORT_TOKENS[effort] != 0)
    limit = limit_of(request.constraint)
    assert (limit.budget if limit else 0) == EFFORT_TOKENS[effort]


BUDGETS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_thinking_tokens": 50, "reasoning_effort": "low"}, 50),
    ({"thinking_budget": 50}, 50),
    ({"thinking_token_budget": 50}, 50),
    ({"thinking": {"budget_tokens": 50}}, 50),
    ({"reasoning": {"max_tokens": 50}}, 50),
    ({"reasoning": {"effort": "high", "enabled": False}}, 32768),
    ({"max_task_thinking_tokens": 70}, 70),
    ({"thinking": {"task_budget_tokens": 70}, "max_thinking_tokens": 90}, 70),
    ({}, None),
]


@pytest.mark.parametrize(("body", "budget"), BUDGETS, ids=str)
def test_every_name_of_a_budget(body: dict[str, Any], budget: int | None) -> None:
    session = scripted_session(f"t</think>Answer{END}")
    _, _, details = read("chat", post(session, "chat", {"messages": HELLO, **body}))
    assert details["thinking_budget_tokens"] == budget


@pytest.mark.parametrize(
    "body", [{"reasoning": {"enabled": False}}, {"max_task_thinking_tokens": 0}], ids=str
)
def test_thinking_off(body: dict[str, Any]) -> None:
    session = scripted_session(f"Answer{END}")
    post(session, "chat", {"messages": HELLO, **body})
    (request,) = engine_of(session).requests
    assert session.tokenizer.decode(request.prompt_token_ids).endswith("<think>\n\n</think>\n")


@APIS
def test_a_budget_of_the_task_survives_turns_of_tools(api: str) -> None:
    """Whether the client sends the thought back (Responses, Messages) or drops it (chat)."""
    session = scripted_session(f"Thirteen tok</think>{CALL_TEXT}{END}", f"Again and again</think>Done{END}")
    body = body_of(api, tool_choice="auto", max_task_thinking_tokens=20)
    first = post(session, api, body).json()
    match api:
        case "chat":
            message = {k: v for k, v in first["choices"][0]["message"].items() if "reasoning" not in k}
            call_id = message["tool_calls"][0]["id"]
            body["messages"] = [*HELLO, message, {"role": "tool", "tool_call_id": call_id, "content": "rain"}]
        case "responses":
            output = {"type": "function_call_output", "output": "rain"}
            body["input"] = [*HELLO, *first["output"], {**output, "call_id": first["output"][-1]["call_id"]}]
        case _:
            result = {"type": "tool_result", "tool_use_id": first["content"][-1]["id"], "content": "rain"}
            answer = {"role": "assistant", "content": first["content"]}
            body["messages"] = [*HELLO, answer, {"role": "user", "content": [result]}]
    content, _, details = read(api, post(session, api, body))
    assert content == "Done"
    assert details["thinking_cut"] == "task_budget"
    assert details["thinking_budget_tokens"] == 20 - 13
    counted = details["thinking_tokens" if api == "messages" else "reasoning_tokens"]
    assert details["task_reasoning_tokens"] == 13 + counted


@APIS
def test_the_server_may_set_limits_for_clients_that_cannot(api: str) -> None:
    text = f"A thought that is too long\n</think>\nAnswer{END}"
    cases = (("max_thinking_tokens", "budget"), ("max_task_thinking_tokens", "task_budget"))
    for name, reason in cases:
        client = client_of(scripted_session(text), **{name: 9})
        details = read(api, client.post(PATHS[api], json=body_of(api)))[2]
        assert (details["thinking_cut"], details["thinking_budget_tokens"]) == (reason, 9)
