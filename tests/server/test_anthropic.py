"""The Anthropic API end to end over HTTP, with a scripted engine behind it."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.assistant.budget import limit_of
from stepflash.server.anthropic_decode import MessagesBody
from stepflash.server.app import create_app
from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.in_process import client_of, named_events

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "additionalProperties": False,
    },
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
THINK = {"type": "enabled", "budget_tokens": 2000}
ANSWER = "Let me think\n</think>\nHi there" + END


def post(session: Any, **body: Any) -> httpx.Response:
    fields = {"model": "scripted", "max_tokens": 1000, "messages": HELLO, **body}
    fields = {key: value for key, value in fields.items() if value is not ...}
    return client_of(session).post("/v1/messages?beta=true", json=fields)


def reply(text: str, **body: Any) -> dict[str, Any]:
    response = post(scripted_session(text, bursts=[3]), **body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(**body: Any) -> str:
    """The prompt that a body amounts to."""
    session = scripted_session(ANSWER, max_context_tokens=20_000)
    response = post(session, **body)
    assert response.status_code == 200, response.text
    return session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)


def tokens_of(**body: Any) -> tuple[int, ...]:
    session = scripted_session(ANSWER, max_context_tokens=20_000)
    assert post(session, **body).status_code == 200
    return engine_of(session).requests[0].prompt_token_ids


# Replies


def test_a_whole_message() -> None:
    response = post(scripted_session(ANSWER, bursts=[4]), thinking=THINK)
    assert response.headers["request-id"].startswith("req_")
    message = response.json()
    assert message.pop("id").startswith("msg_")
    usage = message.pop("usage")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": [
            {"type": "thinking", "thinking": "Let me think", "signature": ""},
            {"type": "text", "text": "Hi there"},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    # The scripted engine says that one token of the prompt was cached; 24 tokens as in the OpenAI test.
    assert usage["cache_read_input_tokens"] == 1
    assert usage["output_tokens"] == 24
    details = usage["output_tokens_details"]
    assert 0 < details.pop("accepted_draft_tokens") <= details.pop("drafted_tokens")
    assert details == {
        "thinking_tokens": 14,
        "thinking_budget_tokens": 2000,
        "thinking_cut": None,
        "task_reasoning_tokens": None,
    }
    body = {"messages": HELLO, "thinking": THINK}
    count = client_of(scripted_session("x")).post("/v1/messages/count_tokens", json=body)
    assert usage["input_tokens"] + 1 == count.json()["input_tokens"]


def test_the_events_of_a_stream() -> None:
    text = "hm\n</think>\nSure." + CALL + "bye" + END
    response = post(scripted_session(text, bursts=[500]), thinking=THINK, tools=[WEATHER], stream=True)
    events = named_events(response)
    kinds = [
        (e["type"], e.get("index"), (e.get("delta") or e.get("content_block") or {}).get("type"))
        for e in events
    ]
    assert kinds == [
        ("message_start", None, None),
        ("ping", None, None),
        ("content_block_start", 0, "thinking"),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, "text"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, "tool_use"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, "text"),
        ("content_block_delta", 3, "text_delta"),
        ("content_block_stop", 3, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert start["usage"]["input_tokens"] > 1
    assert events[8]["content_block"]["input"] == {}
    assert events[8]["content_block"]["id"].startswith("toolu_")
    assert json.loads(events[9]["delta"]["partial_json"]) == {"city": "Oslo", "days": 2}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    final = events[-2]["usage"]
    assert final["cache_read_input_tokens"] == 1
    assert final["input_tokens"] + 1 == start["usage"]["input_tokens"]
    assert final["output_tokens"] > 0


def test_tool_use() -> None:
    message = reply("t\n</think>\n" + CALL + CALL + END, tools=[WEATHER], thinking=THINK)
    assert message["stop_reason"] == "tool_use"
    calls = message["content"][1:]
    assert [(c["type"], c["name"], c["input"]) for c in calls] == [
        ("tool_use", "weather", {"city": "Oslo", "days": 2})
    ] * 2
    assert calls[0]["id"] != calls[1]["id"]


def test_a_stop_sequence_is_named() -> None:
    message = reply("one STOP two" + END, stop_sequences=["xyz", "STOP"])
    assert message["content"] == [{"type": "text", "text": "one "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "STOP")


def test_the_limit_of_tokens_and_that_of_the_context() -> None:
    assert reply("long answer" + END, max_tokens=4)["stop_reason"] == "max_tokens"
    session = scripted_session("word " * 400, max_context_tokens=300)
    response = post(session, max_tokens=128_000)
    assert response.json()["stop_reason"] == "model_context_window_exceeded"
    request = engine_of(session).requests[0]
    assert request.sampling.max_tokens == 300 - len(request.prompt_token_ids)


def test_an_empty_answer_has_no_blocks() -> None:
    assert reply(END)["content"] == []


# Thinking


@pytest.mark.parametrize("thinking", [..., {"type": "disabled"}])
def test_without_thinking_the_thought_is_empty(thinking: Any) -> None:
    assert prompt_of(thinking=thinking).endswith("<|im_start|>assistant\n<think>\n\n</think>\n")


@pytest.mark.parametrize("thinking", [THINK, {"type": "adaptive", "display": "omitted"}])
def test_with_thinking_it_is_open(thinking: Any) -> None:
    assert prompt_of(thinking=thinking).endswith("<|im_start|>assistant\n<think>\n")


def test_the_budget_of_the_thought_reaches_the_engine() -> None:
    cases: tuple[tuple[Any, Any, int | None], ...] = (
        (THINK, ..., 2000),
        (THINK, {"effort": "low"}, 2000),
        ({"type": "adaptive"}, {"effort": "low"}, 1024),
        ({"type": "adaptive"}, ..., None),
    )
    for thinking, output_config, budget in cases:
        session = scripted_session(ANSWER)
        post(session, thinking=thinking, output_config=output_config)
        limit = limit_of(engine_of(session).requests[0].constraint)
        assert limit is not None
        assert limit.budget == budget
    session = scripted_session("Hi there" + END)
    post(session, thinking=...)
    assert engine_of(session).requests[0].constraint is None


def test_an_omitted_thought_comes_back_with_the_history() -> None:
    thought = "Gr\u00fc\u00dfe \U0001f680"
    adaptive = {"type": "adaptive", "display": "omitted"}
    message = reply(thought + "\n</think>\n" + CALL + END, tools=[WEATHER], thinking=adaptive)
    assert message["content"][0]["thinking"] == ""
    assert thought not in json.dumps(message, ensure_ascii=False)
    result = {"type": "tool_result", "tool_use_id": message["content"][1]["id"], "content": "rain"}
    history = [
        *HELLO,
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [result]},
    ]
    assert f"<think>\n{thought}\n</think>\n<tool_call>" in prompt_of(
        messages=history, tools=[WEATHER], thinking=adaptive
    )


@pytest.mark.parametrize(
    "block",
    [
        {"type": "thinking", "thinking": "", "signature": "EqQBCkgIAR"},
        {"type": "thinking", "thinking": "", "signature": "stepflash-thought:!!"},
        {"type": "redacted_thinking", "data": "EqQBCkgIAR"},
    ],
)
def test_a_thought_that_cannot_be_read_is_left_out(block: dict[str, Any]) -> None:
    history = [*HELLO, {"role": "assistant", "content": [block, {"type": "text", "text": "Hi"}]}, *HELLO]
    assert "<|im_start|>assistant\nHi<|im_end|>" in prompt_of(messages=history)


# Prompts


def test_a_task_of_several_turns() -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Oslo?", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "system", "content": "Now it is noon."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "look it up", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo", "days": 2}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {"city": "Bergen"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "Be brief."},
        {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}},
    ]
    prompt = prompt_of(messages=messages, system=system, tools=[WEATHER], thinking=THINK)
    definition = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": WEATHER["input_schema"],
        },
    }
    assert "<|im_start|>system\nBe brief.\n\nBe kind.\n\n# Tools" in prompt
    assert f"<tools>\n{json.dumps(definition)}\n</tools>" in prompt
    assert (
        "<|im_start|>user\nOslo?<|im_end|>\n<|im_start|>system\nNow it is noon.<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nlook it up\n</think>\nI look.<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n"
        in prompt
    )
    assert prompt.endswith(
        "<|im_start|>tool_response\n<tool_response>rain</tool_response>"
        "<tool_response>Error: no such city</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


BLOCKS = st.sampled_from(["hello", "a\nb", "", " x ", "<system-reminder>r</system-reminder>"])


@settings(max_examples=20)
@given(system=BLOCKS, user=BLOCKS, answer=BLOCKS, result=BLOCKS)
def test_blocks_and_strings_are_the_same_tokens(system: str, user: str, answer: str, result: str) -> None:
    """A client marks the end of a list of blocks in one turn and sends the same as a string in the next."""

    def blocks(text: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]

    def conversation(write: Any) -> dict[str, Any]:
        call = {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Oslo"}}
        tool_result = {"type": "tool_result", "tool_use_id": "t", "content": write(result)}
        return {
            "system": write(system),
            "messages": [
                {"role": "user", "content": write(user)},
                {"role": "assistant", "content": write(answer)},
                {"role": "system", "content": write(user)},
                {"role": "user", "content": write(user)},
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [tool_result]},
            ],
        }

    assert tokens_of(**conversation(blocks)) == tokens_of(**conversation(str))


def test_a_reminder_behind_a_result_does_not_end_the_task() -> None:
    def history(*behind: dict[str, Any]) -> list[dict[str, Any]]:
        call = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}
        thought = {"type": "thinking", "thinking": "look", "signature": ""}
        result = {"type": "tool_result", "tool_use_id": "t", "content": "rain"}
        return [
            *HELLO,
            {"role": "assistant", "content": [thought, call]},
            {"role": "user", "content": [result, *behind]},
        ]

    reminder = prompt_of(
        messages=history({"type": "text", "text": "<system-reminder>be tidy</system-reminder>"})
    )
    assert "<think>\nlook\n</think>" in reminder
    assert "<tool_response>rain\n\n<system-reminder>be tidy</system-reminder></tool_response>" in reminder
    asked = prompt_of(messages=history({"type": "text", "text": "And Bergen?"}))
    assert "</tool_response><|im_end|>\n<|im_start|>user\nAnd Bergen?<|im_end|>" in asked


def test_deferred_tools_wait_outside_of_the_head() -> None:
    fetch = {
        "name": "fetch",
        "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}},
        "defer_loading": True,
    }
    other = {"name": "other", "input_schema": {"type": "object"}, "defer_loading": True}
    search = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}
    found = [
        {"type": "tool_reference", "tool_name": "fetch"},
        {"type": "tool_reference", "tool_name": "gone"},
    ]
    history = [
        *HELLO,
        {"role": "assistant", "content": [search]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": found}]},
    ]
    before = prompt_of(tools=[WEATHER])
    # Gaining the deferred tools, in whatever place, leaves the head as it was.
    assert prompt_of(tools=[fetch, WEATHER, other]) == before
    prompt = prompt_of(messages=history, tools=[fetch, WEATHER, other])
    head, _, rest = prompt.partition("<|im_end|>")
    assert before.startswith(head)
    definition = {"type": "function", "function": {"name": "fetch", "parameters": fetch["input_schema"]}}
    assert json.dumps(definition) in rest
    assert "gone" in rest
    assert "other" not in prompt
    call = "<tool_call>\n<function=fetch>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>"
    message = reply(call + END, messages=history, tools=[fetch, WEATHER])
    assert message["content"][0]["input"] == {"n": 5}, "the schema of a deferred tool types its arguments"


def test_media_in_a_tool_result_is_left_out_with_a_note() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    call = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image]}
    history = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert "<tool_response>[image left out: this model reads text only]</tool_response>" in prompt_of(
        messages=history
    )


HEADER = "x-anthropic-billing-header: cc_version=2.1.330.bc1; cc_entrypoint=sdk-cli; cch=3f1a2;"


def test_the_billing_header_is_dropped() -> None:
    system = [{"type": "text", "text": HEADER}, {"type": "text", "text": "You are a robot."}]
    plain = tokens_of(system="You are a robot.")
    assert tokens_of(system=system) == plain
    assert tokens_of(system=[{"type": "text", "text": HEADER}]) == tokens_of()
    session = scripted_session(ANSWER)
    body = {"model": "scripted", "max_tokens": 9, "messages": HELLO, "system": system}
    client_of(session, is_canonical=False).post("/v1/messages", json=body)
    prompt = session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)
    assert f"{HEADER}\n\nYou are a robot." in prompt


def test_an_answer_goes_on_from_given_text() -> None:
    session = scripted_session("42}" + END, bursts=[2])
    given = '{"answer": '
    response = post(session, messages=[*HELLO, {"role": "assistant", "content": given}], thinking=THINK)
    assert response.json()["content"] == [{"type": "text", "text": "42}"}]
    prompt = session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)
    assert prompt.endswith(f"<think>\n\n</think>\n{given}")


@pytest.mark.parametrize("bursts", [[1], [2], [100]])
def test_given_text_holds_no_stop_sequence_and_takes_nothing_from_the_answer(bursts: list[int]) -> None:
    def said(given: str, text: str, **options: Any) -> tuple[list[dict[str, Any]], str | None]:
        session = scripted_session(text + END, bursts=bursts)
        messages = [*HELLO, {"role": "assistant", "content": given}]
        message = post(session, messages=messages, **options).json()
        return message["content"], message["stop_sequence"]

    fence = {"stop_sequences": ["```"]}
    assert said("```json", "\n{}\n```\nThere.", **fence) == ([{"type": "text", "text": "\n{}\n"}], "```")
    # Half of it given is not all of it, nor is what stands in the thought.
    assert said("``", "` x", **fence) == ([{"type": "text", "text": "` x"}], None)
    assert said("x <", "y") == ([{"type": "text", "text": "y"}], None)
    thought = {"type": "thinking", "thinking": " so", "signature": ""}
    answer = {"type": "text", "text": "A whole answer"}
    assert said("<think>\nhm", " so\n</think>\nA whole answer") == ([thought, answer], None)
    begun = CALL[: CALL.index("</parameter>")]
    call, text = said(begun, CALL[len(begun) :] + "\nA whole answer", tools=[WEATHER])[0]
    assert (call["type"], text["text"].strip()) == ("tool_use", "A whole answer")


def test_tool_choice_none_and_one_call_at_a_time() -> None:
    assert "# Tools" not in prompt_of(tools=[WEATHER], tool_choice={"type": "none"})
    one = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(reply(CALL + CALL + END, tools=[WEATHER], tool_choice=one)["content"]) == 1


def test_sampling_parameters_reach_the_engine() -> None:
    session = scripted_session(ANSWER)
    post(session, temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["x"], max_tokens=7)
    sampling = engine_of(session).requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.stop, sampling.max_tokens) == (("x",), 7)


# Other bodies


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {"user_id": '{"session": 1}'}, "service_tier": "auto", "unknown": [1]},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"output_config": {"effort": "high"}, "cache_control": {"type": "ephemeral"}, "betas": ["x"]},
        {"tools": [{**WEATHER, "cache_control": {"type": "ephemeral"}, "strict": True, "type": "custom"}]},
        {"system": None, "tools": None, "tool_choice": None, "thinking": None, "temperature": None},
    ],
)
def test_harmless_fields_are_accepted(body: dict[str, Any]) -> None:
    if body.get("tools"):
        body = {**body, "thinking": THINK}
    assert tokens_of(**body)[-4:] == tokens_of(thinking=body.get("thinking", ...))[-4:]


def test_documents_of_text_search_results_and_examples_are_read() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "Rain."}
    found = {
        "type": "search_result",
        "title": "T",
        "source": "s",
        "content": [{"type": "text", "text": "Sun."}],
    }
    blocks = [{"type": "document", "title": "News", "source": source}, found]
    assert "user\nNews\n\nRain.\n\nT\n\ns\n\nSun.<|im_end|>" in prompt_of(
        messages=[{"role": "user", "content": blocks}]
    )
    examples = [{"city": "Oslo"}]
    assert '"examples": [{"city": "Oslo"}]' in prompt_of(tools=[{**WEATHER, "input_examples": examples}])


def test_thoughts_between_tools_and_within_a_budget_of_the_task() -> None:
    between = {"type": "between_tools"}
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "rain"}
    turns = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert prompt_of(thinking=between).endswith("<think>\n\n</think>\n")
    assert prompt_of(thinking=between, messages=turns).endswith("<think>\n")
    for budget, limit in (({"total": 9}, 9), ({"total": 9, "remaining": 4}, 4)):
        session = scripted_session(ANSWER)
        config = {"task_budget": {"type": "tokens", **budget}}
        post(session, thinking={"type": "adaptive"}, output_config=config)
        found_limit = limit_of(engine_of(session).requests[0].constraint)
        assert found_limit is not None
        assert found_limit.budget == limit


ERRORS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "claude-sonnet-4-5"}, 404, "claude-sonnet-4-5"),
    ({"max_tokens": ...}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "messages.0.content.0.type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, 400, "messages.0.content.0"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
    ({"system": 3}, 400, "system"),
    ({"system": [{"type": "image"}]}, 400, "system.0.type"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"stop_sequences": [""]}, 400, "stop_sequences"),
    ({"stop_sequences": "x"}, 400, "stop_sequences"),
    ({"thinking": {"type": "deep"}}, 400, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": -1}}, 400, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, 400, "thinking.budget_tokens"),
    ({"tools": {}}, 400, "tools"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "tools.0.type"),
    ({"tools": [{"name": "f"}]}, 400, "tools.0.input_schema"),
    ({"tools": [{"input_schema": {}}]}, 400, "tools.0.name"),
    ({"tools": [{"name": "f", "input_schema": "x"}]}, 400, "tools.0.input_schema"),
    ({"tools": [WEATHER, WEATHER]}, 400, "tools"),
    ({"tool_choice": {"type": "any"}}, 400, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, 400, "tool_choice"),
    ({"tool_choice": {"type": "some"}}, 400, "tool_choice.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, 400, "output_config.format.schema"),
    ({"output_config": {"effort": "huge"}}, 400, "output_config.effort"),
    ({"mcp_servers": [{"name": "x"}]}, 400, "mcp_servers"),
    ({"thinking": {}}, 400, "thinking.type"),
    ({"tool_choice": {}}, 400, "tool_choice.type"),
    ({"output_config": {"task_budget": 5}}, 400, "output_config.task_budget"),
    ({"output_config": {"task_budget": {"type": "tokens", "total": -1}}}, 400, "task_budget.total"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, 400, "edits.0"),
    ({"context_management": {"edits": 5}}, 400, "edits.0"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "tools.0.type"),
    ({"tools": [{**WEATHER, "allowed_callers": ["code_execution"]}]}, 400, "tools.0.allowed_callers"),
    (
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "text"}}]}]},
        400,
        "messages.0.content.0.source",
    ),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
    ({"logit_bias": {"1" * 5000: 1}}, 400, "logit_bias"),
    ({"container": "x"}, 400, "container"),
]
TYPES = {400: "invalid_request_error", 404: "not_found_error"}


@pytest.mark.parametrize(("body", "status", "named"), ERRORS)
def test_errors_name_the_field(body: dict[str, Any], status: int, named: str) -> None:
    response = post(scripted_session(ANSWER), **body)
    error = response.json()
    assert (response.status_code, error["type"], error["error"]["type"]) == (
        status,
        "error",
        TYPES[status],
    ), error
    assert named in error["error"]["message"]
    assert response.headers["request-id"]


def test_a_prompt_that_does_not_fit() -> None:
    response = post(scripted_session("x", max_context_tokens=20), stream=True)
    num_tokens = len(tokens_of())
    assert response.status_code == 400
    assert response.json()["error"] == {
        "type": "invalid_request_error",
        "message": f"prompt is too long: {num_tokens} tokens > 20 maximum",
    }


def test_an_engine_error_before_and_in_a_stream() -> None:
    session = scripted_session("abcdef", error="NaN logits", error_after=3)
    response = post(session)
    assert (response.status_code, response.json()["error"]) == (
        500,
        {"type": "api_error", "message": "NaN logits"},
    )
    events = named_events(post(session, stream=True))
    assert events[-1].pop("request_id").startswith("req_")
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "NaN logits"}}


def test_keys_routes_and_sizes_have_errors_of_this_api() -> None:
    client = client_of(scripted_session("x"), api_keys=("k",), max_body_bytes=100)
    for response, kind in (
        (client.post("/v1/messages", json={}), "authentication_error"),
        (client.get("/v1/messages", headers={"x-api-key": "k"}), "invalid_request_error"),
        (client.post("/v1/messages/batches", headers={"x-api-key": "k"}), "not_found_error"),
        (client.post("/v1/messages", headers={"x-api-key": "k"}, content=b" " * 101), "request_too_large"),
    ):
        assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)
        assert response.json()["request_id"] == response.headers["request-id"]


def test_count_tokens_is_the_prompt_and_does_not_wait_for_answers() -> None:
    """Twenty counts while the engine is busy with an answer that would take a minute."""
    session = scripted_session("word " * 1000, pause=0.05)
    app = create_app(session, "scripted")
    body = {"model": "scripted", "messages": [{"role": "user", "content": "foo"}], "tools": []}

    async def run() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = asyncio.create_task(client.post("/v1/messages", json={**body, "max_tokens": 4000}))
            await asyncio.sleep(0.1)
            counts = await asyncio.gather(
                *(client.post("/v1/messages/count_tokens?beta=true", json=body) for _ in range(20))
            )
            assert not answer.done()
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            return [count.json()["input_tokens"] for count in counts]

    counts = asyncio.run(asyncio.wait_for(run(), 30))
    assert len(engine_of(session).requests) == 1
    assert set(counts) == {len(tokens_of(messages=body["messages"]))}


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
KEYS = ["role", "content", "type", "text", "name", "input", "input_schema", "tool_use_id", "thinking", "x"]
KINDS = st.sampled_from(["text", "thinking", "tool_use", "tool_result", "tool_reference", "any", "tool"])
ANYTHING = st.recursive(
    SCALARS | KINDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"])}, optional={"content": ANYTHING}
    ),
    max_size=3,
)


@settings(max_examples=60)
@given(
    messages=MESSAGES | ANYTHING,
    fields=st.dictionaries(
        st.sampled_from(sorted(set(MessagesBody.model_fields) - {"messages"})), ANYTHING, max_size=4
    ),
)
def test_no_body_is_a_server_error(messages: Any, fields: dict[str, Any]) -> None:
    client = client_of(scripted_session(ANSWER, bursts=[50]))
    body = json.dumps({"max_tokens": 9, "messages": messages, **fields}).encode()
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        response = client.post(path, content=body)
        assert response.status_code in (200, 400, 404), response.text
        assert response.status_code == 200 or response.json()["error"]["message"]
