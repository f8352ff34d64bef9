"""The OpenAI API end to end over HTTP, with a scripted engine behind it."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.assistant.budget import ThoughtLimit
from stepflash.assistant.session import Session
from stepflash.engine.request import TokenLogprob
from stepflash.server.app import create_app
from stepflash.server.openai_chat_encode import logprobs_json
from stepflash.server.openai_schema import ChatBody, CompletionBody
from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.in_process import client_of

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
THOUGHT_AND_ANSWER = "Let me think\n</think>\nHi there" + END


def chat(text: str, *, bursts: tuple[int, ...] = (4,), **body: Any) -> Any:
    client = client_of(scripted_session(text, bursts=bursts))
    return client.post("/v1/chat/completions", json={"model": "scripted", "messages": HELLO, **body})


def frames(response: Any) -> list[dict[str, Any]]:
    """The data frames of a streamed reply, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def fold_chunks(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a client makes of chunks: the messages by choice, written here independently of the server."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(
                part["index"],
                {
                    "content": "",
                    "reasoning": "",
                    "calls": {},
                    "finish_reason": None,
                    "logprobs": [],
                    "other": [],
                },
            )
            delta = part["delta"]
            choice["content"] += delta.get("content") or ""
            choice["reasoning"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["type"] == "function"
                    assert call["function"]["arguments"] == ""
                    choice["calls"][call["index"]] = [call["id"], call["function"]["name"], ""]
                else:
                    choice["calls"][call["index"]][2] += call["function"]["arguments"]
            if part["logprobs"]:
                choice["logprobs"] += part["logprobs"]["content"]
                choice["other"] += part["logprobs"].get("other", [])
            assert choice["finish_reason"] is None, "nothing may follow the finish reason"
            choice["finish_reason"] = part["finish_reason"]
    return choices


def test_chat_completion() -> None:
    response = chat(THOUGHT_AND_ANSWER)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "scripted"
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hi there",
        "refusal": None,
        "reasoning_content": "Let me think",
    }
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 24
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 14
    # 24 tokens in 6 bursts of 4, so 3 accepted drafts each.
    assert usage["completion_tokens_details"]["accepted_draft_tokens"] == 18
    assert usage["prompt_tokens_details"]["cached_tokens"] == 1


@pytest.mark.parametrize(
    ("choice", "fields"), [("reasoning", {"reasoning"}), ("both", {"reasoning", "reasoning_content"})]
)
def test_the_thought_goes_where_the_client_looks(choice: str, fields: set[str]) -> None:
    client = client_of(scripted_session(THOUGHT_AND_ANSWER), reasoning_field=choice)
    body: dict[str, Any] = {"model": "scripted", "messages": HELLO}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert {name: text for name, text in message.items() if "reasoning" in name} == dict.fromkeys(
        fields, "Let me think"
    )
    chunks = frames(client.post("/v1/chat/completions", json=body | {"stream": True}))
    deltas = [part["delta"] for chunk in chunks for part in chunk["choices"]]
    told = {name: "".join(delta.get(name, "") for delta in deltas) for name in fields}
    assert told == dict.fromkeys(fields, "Let me think")
    assert {name for delta in deltas for name in delta} == {"role", "content"} | fields


ANSWERS = st.sampled_from(
    [
        THOUGHT_AND_ANSWER,
        "only a thought" + END,
        "t\n</think>\n" + CALL + END,
        "t\n</think>\nfirst " + CALL + " then " + CALL + END,
        "t</think>\u5317\u4eac \U0001f680 <b>" + END,
        "cut off",
        END,
    ]
)


@settings(max_examples=25)
@given(text=ANSWERS, bursts=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_the_stream_adds_up_to_the_whole_reply(text: str, bursts: list[int]) -> None:
    whole = chat(text, bursts=tuple(bursts), tools=TOOLS, logprobs=True).json()
    streamed = chat(
        text,
        bursts=tuple(bursts),
        tools=TOOLS,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    chunks = frames(streamed)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    folded = fold_chunks(chunks)[0]
    message = whole["choices"][0]["message"]
    assert folded["content"] == (message["content"] or "")
    assert folded["reasoning"] == message.get("reasoning_content", "")
    assert [call[1:] for call in folded["calls"].values()] == [
        [call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])
    ]
    for _, _, arguments in folded["calls"].values():
        assert isinstance(json.loads(arguments), dict)
    assert folded["finish_reason"] == whole["choices"][0]["finish_reason"]
    logprobs = whole["choices"][0]["logprobs"] or {"content": []}
    assert (folded["logprobs"], folded["other"]) == (logprobs["content"], logprobs.get("other", []))


def test_tool_call_of_the_whole_reply() -> None:
    (choice,) = chat("t\n</think>\n" + CALL + END, tools=TOOLS).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


def test_tools_are_rendered_as_sent_and_tool_results_follow() -> None:
    session = scripted_session(THOUGHT_AND_ANSWER)
    arguments = '{"city": "Oslo", "days": 2}'
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Oslo"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "look it up", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    body = {"model": "scripted", "messages": messages, "tools": TOOLS}
    assert client_of(session).post("/v1/chat/completions", json=body).status_code == 200
    prompt = session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)
    assert "<|im_start|>system\nBe brief.\n\n# Tools" in prompt
    assert json.dumps(TOOLS[0]) in prompt
    assert (
        "<|im_start|>user\nOslo?<|im_end|>\n<|im_start|>assistant\n<think>\nlook it up\n</think>\n" in prompt
    )
    assert (
        "<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>"
        in prompt
    )
    assert "<tool_response>rain</tool_response>" in prompt


def test_sampling_parameters_reach_the_engine() -> None:
    session = scripted_session(THOUGHT_AND_ANSWER)
    given_body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["x"],
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100},
        "max_tokens": 9,
        "max_completion_tokens": 11,
        "logprobs": True,
        "top_logprobs": 3,
        "draft_depth": 2,
    }
    body = {"messages": HELLO, **given_body}
    assert client_of(session).post("/v1/chat/completions", json=body).status_code == 200
    sampling = engine_of(session).requests[0].sampling
    expected = {**given_body, "stop": ("x",), "logit_bias": {5: -100.0}, "max_tokens": 11, "logprobs": 3}
    del expected["max_completion_tokens"], expected["top_logprobs"]
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_large_max_tokens_is_clamped_not_refused() -> None:
    session = scripted_session(THOUGHT_AND_ANSWER, max_context_tokens=200)
    body = {"messages": HELLO, "max_tokens": 128_000}
    assert client_of(session).post("/v1/chat/completions", json=body).status_code == 200
    request = engine_of(session).requests[0]
    assert request.sampling.max_tokens == 200 - len(request.prompt_token_ids)


def test_several_choices_share_the_prompt() -> None:
    session = scripted_session("a\n</think>\none" + END, "b\n</think>\ntwo" + END, bursts=[2])
    client = client_of(session)
    whole = client.post("/v1/chat/completions", json={"messages": HELLO, "n": 2, "seed": 3}).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["one", "two"]
    requests = engine_of(session).requests
    assert whole["usage"]["prompt_tokens"] == len(requests[0].prompt_token_ids)
    assert {request.sampling.seed for request in requests} == {3, 4}
    streamed = client.post("/v1/chat/completions", json={"messages": HELLO, "n": 2, "stream": True})
    folded = fold_chunks(frames(streamed))
    assert {index: choice["content"] for index, choice in folded.items()} == {0: "one", 1: "two"}


@pytest.mark.parametrize(
    "body",
    [
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking": {"type": "disabled"}},
        {"thinking_budget": 0},
    ],
)
def test_thinking_can_be_switched_off(body: dict[str, Any]) -> None:
    session = scripted_session("Hi" + END)
    reply = client_of(session).post("/v1/chat/completions", json={"messages": HELLO, **body}).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    prompt = session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)
    assert prompt.endswith("<think>\n\n</think>\n")


@pytest.mark.parametrize(
    "body", [{"thinking_budget": 50}, {"thinking_token_budget": 50}, {"thinking": {"budget_tokens": 50}}]
)
def test_the_budget_of_the_thought_reaches_the_engine(body: dict[str, Any]) -> None:
    session = scripted_session(THOUGHT_AND_ANSWER)
    client_of(session).post("/v1/chat/completions", json={"messages": HELLO, "n": 2, **body})
    first, second = (request.constraint for request in engine_of(session).requests)
    assert isinstance(first, ThoughtLimit)
    assert isinstance(second, ThoughtLimit)
    assert first.budget == 50
    assert first is not second


def test_tool_choice_none_offers_no_tools() -> None:
    session = scripted_session(THOUGHT_AND_ANSWER)
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}
    client_of(session).post("/v1/chat/completions", json=body)
    assert "# Tools" not in session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)


def test_parallel_tool_calls_false_gives_one() -> None:
    reply = chat("t\n</think>\n" + CALL + CALL + END, tools=TOOLS, parallel_tool_calls=False).json()
    assert len(reply["choices"][0]["message"]["tool_calls"]) == 1


FUNCTION = {"type": "function", "function": {"name": "f"}}
ERRORS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "other"}, 404, "model"),
    ({"model": 3}, 400, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{]"}}]},
            ]
        },
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": "9"}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"n": 0}, 400, "n"),
    ({"n": 10_000}, 400, "n"),
    ({"seed": 10**30}, 400, "seed"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"stop": [str(i) for i in range(65)]}, 400, "stop"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"1": 1000}}, 400, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, 400, "logit_bias"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"stream": "yes"}, 400, "stream"),
    ({"tools": {}}, 400, "tools"),
    ({"tools": ["f"]}, 400, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
        400,
        "tools[0].function.parameters",
    ),
    ({"tools": [FUNCTION, FUNCTION]}, 400, "tools[1]"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": "sometimes"}, 400, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": {"function": {"name": "g"}}}, 400, "tool_choice"),
    ({"response_format": {"type": "yaml"}}, 400, "response_format.type"),
    ({"reasoning_effort": "huge"}, 400, "reasoning_effort"),
    ({"thinking_token_budget": -1}, 400, "thinking_token_budget"),
    ({"thinking": {"budget_tokens": 1.5}}, 400, "thinking.budget_tokens"),
    ({"audio": {"voice": "x"}}, 400, "audio"),
    ({"modalities": ["audio"]}, 400, "modalities"),
    ({"web_search_options": {}}, 400, "web_search_options"),
    ({"functions": [{"name": "f"}]}, 400, "functions"),
]


@pytest.mark.parametrize(("body", "status", "param"), ERRORS)
def test_errors_name_the_field(body: dict[str, Any], status: int, param: str | None) -> None:
    response = chat(THOUGHT_AND_ANSWER, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "verbosity": "medium"},
        {"prompt_cache_key": "k", "prediction": None, "safety_identifier": "s", "unknown_field": [1]},
        {
            "modalities": ["text"],
            "response_format": {"type": "text"},
            "functions": [],
            "function_call": "none",
        },
        {"stop": None, "temperature": None, "max_tokens": None, "n": None, "tools": [], "logprobs": False},
        {"reasoning": {"effort": "high", "enabled": False}, "reasoning_effort": "high", "top_k": -1},
    ],
)
def test_harmless_fields_are_accepted(body: dict[str, Any]) -> None:
    assert chat(THOUGHT_AND_ANSWER, **body).status_code == 200


BAD_JSON = [
    b"",
    b"{",
    b"nonsense",
    b"[1]",
    b"null",
    b'"x"',
    b"3",
    b"\xff\xfe",
    b'{"messages": NaN}',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
]


@pytest.mark.parametrize("raw", BAD_JSON, ids=lambda raw: repr(raw[:20]))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_bad_json_is_a_client_error(raw: bytes, path: str) -> None:
    response = client_of(scripted_session("x")).post(path, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("raw", BAD_JSON, ids=lambda raw: repr(raw[:20]))
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_bad_json_is_a_client_error_in_the_anthropic_api(raw: bytes, path: str) -> None:
    response = client_of(scripted_session("x")).post(path, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "name", "arguments", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
        optional={
            "content": ANYTHING,
            "tool_calls": ANYTHING,
            "reasoning_content": ANYTHING,
            "name": ANYTHING,
        },
    ),
    max_size=3,
)
FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields} - {"messages", "model"})


@settings(max_examples=60)
@given(
    messages=MESSAGES | ANYTHING,
    prompt=ANYTHING,
    fields=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4),
)
def test_no_body_is_a_server_error(messages: Any, prompt: Any, fields: dict[str, Any]) -> None:
    client = client_of(scripted_session(THOUGHT_AND_ANSWER, bursts=[50]))
    chat_body = json.dumps({"messages": messages, **fields}).encode("utf-8", "surrogatepass")
    text_body = json.dumps({"prompt": prompt, **fields}).encode("utf-8", "surrogatepass")
    for path, body in (("/v1/chat/completions", chat_body), ("/v1/completions", text_body)):
        response = client.post(path, content=body)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert response.json()["error"]["message"]


def test_a_ruled_out_token_has_a_finite_logprob() -> None:
    token = TokenLogprob(token_id=65, logprob=0.0, top=((66, float("-inf")),))
    encoded = logprobs_json([token], lambda token_id: bytes([token_id]))
    assert json.loads(json.dumps(encoded, allow_nan=False))[0]["top_logprobs"][0]["logprob"] == -9999


def test_a_prompt_that_does_not_fit() -> None:
    client = client_of(scripted_session("x", max_context_tokens=20))
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 20 tokens" in error["message"]


def test_an_engine_error_before_and_in_a_stream() -> None:
    client = client_of(scripted_session("abcdef", error="NaN logits", error_after=3))
    response = client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "NaN logits"
    streamed = client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    assert streamed.status_code == 200
    assert frames(streamed)[-1]["error"]["type"] == "server_error"


def test_a_long_prompt_is_prepared_the_same() -> None:
    session = scripted_session(THOUGHT_AND_ANSWER, max_context_tokens=100_000)
    messages = [{"role": "user", "content": "word " * 10_000}]
    assert client_of(session).post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert len(engine_of(session).requests[0].prompt_token_ids) > 50_000


def test_a_body_beyond_the_limit_is_refused() -> None:
    client = client_of(scripted_session("x"), max_body_bytes=1000)
    assert client.post("/v1/chat/completions", content=b" " * 1001).status_code == 413


def test_unknown_routes_and_methods_have_the_error_body() -> None:
    client = client_of(scripted_session("x"))
    for response, status in ((client.get("/v2"), 404), (client.get("/v1/chat/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["message"]


# Text completions


def test_completion_whole_and_streamed() -> None:
    text = " wörld ∞</think>"
    client = client_of(scripted_session(text + END, bursts=[3]))
    body = {"model": "scripted", "prompt": "hello", "max_tokens": 50, "logprobs": 1}
    whole = client.post("/v1/completions", json=body).json()
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    # A token of whole characters stands where its offset says.
    assert len(tokens) == len(offsets) > 5
    assert offsets[0] == 0
    assert all(
        text.startswith(token, at) for token, at in zip(tokens, offsets, strict=True) if "�" not in token
    )
    assert offsets == sorted(offsets)
    chunks = frames(client.post("/v1/completions", json={**body, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    told = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert list(itertools.chain(*(part[name] for part in told))) == choice["logprobs"][name]


def test_completion_of_several_prompts() -> None:
    session = scripted_session("a" + END, "b" + END, "c" + END, "d" + END)
    body = {"prompt": ["p", "q"], "n": 2, "echo": True}
    reply = client_of(session).post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in reply["choices"]] == ["pa", "pb", "qc", "qd"]
    # Two prompts of bos and one letter, each counted once.
    assert reply["usage"]["prompt_tokens"] == 4


def test_completion_of_token_ids() -> None:
    session = scripted_session("a" + END)
    assert client_of(session).post("/v1/completions", json={"prompt": [5, 6, 7]}).status_code == 200
    assert engine_of(session).requests[0].prompt_token_ids == (5, 6, 7)
    assert engine_of(session).requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logprobs": -1}, "logprobs"),
    ],
)
def test_completion_errors(body: dict[str, Any], param: str) -> None:
    response = client_of(scripted_session("x")).post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# Everything else that the server has


def test_models() -> None:
    client = client_of(scripted_session("x", max_context_tokens=1234))
    listing = client.get("/v1/models").json()
    assert [model["id"] for model in listing["data"]] == ["scripted"]
    assert client.get("/v1/models/scripted").json()["max_model_len"] == 1234
    assert client.get("/v1/models/other").status_code == 404


def test_health_generates_a_token() -> None:
    session = scripted_session("x")
    assert client_of(session).get("/health").json()["status"] == "ok"
    assert [request.sampling.max_tokens for request in engine_of(session).requests] == [1]
    client = client_of(session)
    client.post("/v1/chat/completions", json={"messages": HELLO})
    assert client.get("/health").json()["status"] == "ok"
    assert asyncio.run(client._request("HEAD", "/health")).status_code == 200  # as load balancers ask
    assert len(engine_of(session).requests) == 2, "a token that somebody just got is proof enough"
    broken = client_of(scripted_session("x", error="no")).get("/health")
    assert (broken.status_code, broken.json()["status"]) == (503, "no")


def test_metrics_count() -> None:
    client = client_of(scripted_session(THOUGHT_AND_ANSWER, bursts=[4]))
    client.post("/v1/chat/completions", json={"messages": HELLO})
    client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    client.post("/v1/chat/completions", json={"messages": []})
    text = client.get("/metrics").text
    assert 'stepflash_requests_total{route="/v1/chat/completions",status="200"} 2' in text
    assert 'stepflash_requests_total{route="/v1/chat/completions",status="400"} 1' in text
    assert 'stepflash_tokens_total{kind="generated"} 48' in text
    assert "stepflash_running_answers 0" in text
    assert "stepflash_first_token_seconds_count 2" in text
    assert "stepflash_engine_num_free_blocks 7.0" in text


def test_the_page_is_served() -> None:
    client = client_of(scripted_session("x"))
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for name in ("chat.js", "chat.css"):
        assert f"page/{name}" in page.text
        assert client.get(f"/page/{name}").status_code == 200
    assert client.get("/page/none.js").status_code == 404
    assert client.get("/page/..%2fapp.py").status_code == 404


@pytest.mark.parametrize(
    "path", ["/", "/page/chat.js", "/v1/models", "/metrics", "/openapi.json", "/nothing"]
)
def test_keys_guard_every_route_but_health(path: str) -> None:
    client = client_of(scripted_session("x"), api_keys=("first", "s\u00e9cond"))
    assert client.get("/health").status_code == 200
    expected = client.get(path, headers={"authorization": "Bearer first"}).status_code
    assert expected in (200, 404)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}, {"x-api-key": ""}):
        assert client.get(path, headers=headers).status_code == 401
    for headers in (
        {b"x-api-key": b"first"},
        {b"authorization": "Bearer s\u00e9cond".encode()},
        {b"authorization": b"Basic dTpmaXJzdA=="},  # u:first
    ):
        assert client.get(path, headers=headers).status_code == expected


def test_a_client_that_leaves_aborts_its_request() -> None:
    """Over plain ASGI, where the moment of leaving can be chosen; streamed and not."""
    for stream in (True, False):
        session = scripted_session("long " * 1000, pause=0.001)
        app = create_app(session, "scripted")
        body = json.dumps({"messages": HELLO, "stream": stream}).encode()
        asyncio.run(asyncio.wait_for(_leave_after_three(app, body, session), 10))
        assert engine_of(session).aborted == [engine_of(session).requests[0].request_id]


async def _leave_after_three(app: Any, body: bytes, session: Session) -> None:
    messages: Iterator[dict[str, Any]] = iter([{"type": "http.request", "body": body, "more_body": False}])
    leaving = asyncio.Event()

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [],
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    serving = asyncio.create_task(app(scope, receive, send))
    while not engine_of(session).requests:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    leaving.set()
    await serving
