"""Property: whatever the model writes and however its tokens come, every API's stream adds up to its whole reply,
and all APIs tell the same thought, text and calls as the hand-written meaning of the corpus.

The streams are folded here, by what the APIs promise, and not with the server's own code.
"""

import json
from typing import Any

import jiter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat.parser_corpus import CORPUS, TOOLS, Case
from tests.scripted_engine import END, scripted_session
from tests.server.in_process import client_of, named_events

HELLO = [{"role": "user", "content": "hello"}]
FUNCTIONS = [dict(tool.definition["function"]) for tool in TOOLS]

# What all APIs tell, without ids and without the order of text and calls: (thought, text, calls).
Told = tuple[str, str, list[tuple[str, dict[str, Any]]]]


def told(case: Case) -> Told:
    calls = [(name, values) for name, values, _ in case.calls]
    if case.cut_arguments:
        calls.append(("weather", arguments(case.cut_arguments)))
    return case.reasoning or "", case.content or "", calls


def arguments(text: str) -> dict[str, Any]:
    """As the anthropic package reads them in a stream: of a call that was cut off, the whole values."""
    values: dict[str, Any] = jiter.from_json(text.encode(), partial_mode=True)
    return values


def chat_body(case: Case) -> dict[str, Any]:
    tools = [{"type": "function", "function": function} for function in FUNCTIONS]
    return {"messages": HELLO, "tools": tools, "reasoning_effort": "high" if case.thinks else "none"}


def messages_body(case: Case) -> dict[str, Any]:
    tools = [{"name": f["name"], "input_schema": f["parameters"]} for f in FUNCTIONS]
    thinking = {"type": "adaptive" if case.thinks else "disabled"}
    return {"messages": HELLO, "tools": tools, "max_tokens": 4000, "thinking": thinking}


def responses_body(case: Case) -> dict[str, Any]:
    tools = [{"type": "function", **function} for function in FUNCTIONS]
    effort = "high" if case.thinks else "none"
    return {"input": "hello", "tools": tools, "reasoning": {"effort": effort}, "store": False}


def told_by_chat(reply: dict[str, Any]) -> tuple[Told, str]:
    (choice,) = reply["choices"]
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    read = [(call["name"], arguments(call["arguments"])) for call in calls]
    return (message.get("reasoning_content") or "", message["content"] or "", read), choice["finish_reason"]


def told_by_chat_stream(text: str) -> tuple[Told, str]:
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    finish_reason = None
    frames = [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    for chunk in map(json.loads, frames[:-1]):
        (choice,) = chunk["choices"]
        assert finish_reason is None
        finish_reason = choice["finish_reason"]
        for key in ("content", "reasoning_content"):
            message[key] += choice["delta"].get(key) or ""
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append({"function": dict(call["function"])})
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return told_by_chat({"choices": [{"message": message, "finish_reason": finish_reason}]})


def told_by_message(message: dict[str, Any]) -> tuple[Told, str]:
    blocks = message["content"]
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    assert all(thoughts), "no empty block"
    assert all(texts), "no empty block"
    calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    return ("".join(thoughts), "".join(texts), calls), message["stop_reason"]


def folded_message(events: list[dict[str, Any]]) -> dict[str, Any]:
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    message, is_open, parts = events[0]["message"], False, []
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            is_open, parts = True, []
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert is_open
            (value,) = [value for key, value in event["delta"].items() if key != "type"]
            parts.append(value)
        elif event["type"] == "content_block_stop":
            is_open, block = False, message["content"][-1]
            if block["type"] == "tool_use":
                block["input"] = arguments("".join(parts))
            else:
                block[block["type"]] = "".join(parts)
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    assert not is_open
    return message


def told_by_response(response: dict[str, Any]) -> tuple[Told, str]:
    texts: dict[str, list[str]] = {"reasoning": [], "message": []}
    calls = []
    for item in response["output"]:
        if item["type"] == "function_call":
            calls.append((item["name"], arguments(item["arguments"])))
        else:
            texts[item["type"]] += [part["text"] for part in item["content"]]
    assert all(texts["reasoning"] + texts["message"]), "no empty part"
    return ("".join(texts["reasoning"]), "".join(texts["message"]), calls), response["status"]


def folded_response(events: list[dict[str, Any]]) -> dict[str, Any]:
    """From the deltas alone; what the done events and the last one repeat must be the same."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "content_part.added":
            items[-1]["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            items[-1]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert items[-1]["content"][event["content_index"]]["text"] == event["text"]
        elif kind == "function_call_arguments.delta":
            items[-1]["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert items[-1]["arguments"] == event["arguments"]
        elif kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert event["item"] == items[-1]
    final = events[-1]["response"]
    assert final["output"] == items
    return final


REASONS = {
    "stop": ("stop", "end_turn", "completed"),
    "tool_calls": ("tool_calls", "tool_use", "completed"),
    "length": ("length", "max_tokens", "incomplete"),
}


def check(case: Case, bursts: list[int]) -> None:
    text = case.text + (END if case.reason == "stop" else "")
    if not text:
        return  # an engine always answers with at least one token
    reason = "tool_calls" if case.calls and case.reason == "stop" else case.reason
    client = client_of(scripted_session(text, bursts=bursts, max_context_tokens=50_000))
    expected = told(case)

    def both(path: str, body: dict[str, Any]) -> tuple[Any, Any]:
        return client.post(path, json=body), client.post(path, json={**body, "stream": True})

    whole, streamed = both("/v1/chat/completions", chat_body(case))
    assert told_by_chat(whole.json()) == (expected, REASONS[reason][0])
    assert told_by_chat_stream(streamed.text) == (expected, REASONS[reason][0])

    whole, streamed = both("/v1/messages", messages_body(case))
    folded = folded_message(named_events(streamed))
    assert told_by_message(whole.json()) == (expected, REASONS[reason][1])
    assert without_ids(folded) == without_ids(whole.json())

    whole, streamed = both("/v1/responses", responses_body(case))
    folded = folded_response(named_events(streamed))
    assert told_by_response(whole.json()) == (expected, REASONS[reason][2])
    assert without_ids(folded) == without_ids(whole.json())


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        hidden = ("id", "call_id", "created_at")
        return {key: without_ids(inner) for key, inner in value.items() if key not in hidden}
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS.keys())
def test_every_case_of_the_corpus(case: Case) -> None:
    check(case, [1])
    check(case, [10_000])


@settings(max_examples=40)
@given(
    case=st.sampled_from(list(CORPUS.values())), bursts=st.lists(st.integers(1, 40), min_size=1, max_size=5)
)
def test_random_bursts_of_random_cases(case: Case, bursts: list[int]) -> None:
    check(case, bursts)


TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=clock>",
    "</function>",
    "<function=write>",
]
PIECES = [*TAGS, "<parameter=content>", "</parameter>", "\n", "x", "<", "\u65e5\u672c"]


@settings(max_examples=40)
@given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=14),
    bursts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_all_apis_tell_the_same_of_any_text(pieces: list[str], bursts: list[int]) -> None:
    """No meaning is written down for these: the whole chat reply in one burst is the measure for all others."""
    text = "".join(pieces) + END
    case = Case(text)
    reference = client_of(scripted_session(text, bursts=[10_000])).post(
        "/v1/chat/completions", json=chat_body(case)
    )
    expected, _ = told_by_chat(reference.json())
    client = client_of(scripted_session(text, bursts=bursts, max_context_tokens=50_000))
    chat = client.post("/v1/chat/completions", json={**chat_body(case), "stream": True})
    messages = client.post("/v1/messages", json={**messages_body(case), "stream": True})
    responses = client.post("/v1/responses", json={**responses_body(case), "stream": True})
    assert told_by_chat_stream(chat.text)[0] == expected
    assert told_by_message(folded_message(named_events(messages)))[0] == expected
    assert told_by_response(folded_response(named_events(responses)))[0] == expected
