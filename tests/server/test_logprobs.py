"""Log-probabilities stand with the text that their tokens wrote: in chat completions and responses, streamed or not.

Tokens of the scripted model are single bytes, so what is right is plain: the bytes of the tokens are the text.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat.parser_corpus import CORPUS, TOOLS, Case
from tests.scripted_engine import END, scripted_session
from tests.server.in_process import client_of, named_events
from tests.server.test_openai import fold_chunks, frames

FUNCTIONS = [dict(tool.definition["function"]) for tool in TOOLS]
# Content on both sides of a tag that is no event: what comes in one burst counts as one piece of text.
HAVE_GAPS = {
    "text before the tag, only a newline after",
    "text before the tag, two newlines",
}


def text_of(tokens: list[dict[str, Any]]) -> str:
    return b"".join(bytes(token["bytes"]) for token in tokens).decode()


def ask(path: str, text: str, bursts: list[int], **body: Any) -> Any:
    client = client_of(scripted_session(text, bursts=bursts, max_context_tokens=50_000))
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def chat_logprobs(case: Case, bursts: list[int], stream: bool) -> tuple[str, str]:
    """The texts of `content` and of `other`."""
    text = case.text + (END if case.reason == "stop" else "")
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": function} for function in FUNCTIONS],
        "reasoning_effort": "high" if case.thinks else "none",
        "logprobs": True,
        "stream": stream,
    }
    response = ask("/v1/chat/completions", text, bursts, **body)
    if stream:
        folded = fold_chunks(frames(response))[0]
        return text_of(folded["logprobs"]), text_of(folded["other"])
    logprobs = response.json()["choices"][0]["logprobs"] or {"content": []}
    return text_of(logprobs["content"]), text_of(logprobs.get("other", []))


def response_logprobs(case: Case, bursts: list[int]) -> list[tuple[str, str]]:
    """Of each part of text: the text, and that of its tokens, which the deltas must add up to."""
    text = case.text + (END if case.reason == "stop" else "")
    body = {
        "input": "hello",
        "tools": [{"type": "function", **function} for function in FUNCTIONS],
        "reasoning": {"effort": "high" if case.thinks else "none"},
        "include": ["message.output_text.logprobs"],
        "stream": True,
    }
    events = named_events(ask("/v1/responses", text, bursts, **body))
    deltas: dict[int, list[Any]] = {}
    for event in events:
        if event["type"] == "response.output_text.delta":
            deltas.setdefault(event["output_index"], []).extend(event["logprobs"])
        if event["type"] == "response.output_text.done":
            assert event["logprobs"] == deltas[event["output_index"]]
    parts = []
    for index, item in enumerate(events[-1]["response"]["output"]):
        if item["type"] == "message":
            (part,) = item["content"]
            assert part["logprobs"] == deltas[index]
            parts.append((part["text"], text_of(part["logprobs"])))
    return parts


@pytest.mark.parametrize("name", [name for name, case in CORPUS.items() if case.text])
def test_the_tokens_of_every_case(name: str) -> None:
    case = CORPUS[name]
    whole = chat_logprobs(case, [10_000], stream=False)
    assert len(whole[0] + whole[1]) == len(case.text)
    if name not in HAVE_GAPS:
        assert whole[0] == (case.content or "")
        assert chat_logprobs(case, [1], stream=True) == whole
        for text, tokens in response_logprobs(case, [7]):
            assert tokens == text


@settings(max_examples=40)
@given(
    name=st.sampled_from([name for name, case in CORPUS.items() if case.text and name not in HAVE_GAPS]),
    bursts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_any_bursts(name: str, bursts: list[int]) -> None:
    case = CORPUS[name]
    assert chat_logprobs(case, bursts, stream=True)[0] == (case.content or "")
    for text, tokens in response_logprobs(case, bursts):
        assert tokens == text


@pytest.mark.parametrize("bursts", [[1], [3], [100]])
def test_the_tokens_of_a_stop_string_are_not_content(bursts: list[int]) -> None:
    case = Case("t</think>one ST two STOP three")
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "stop": "STOP"}
    (choice,) = ask("/v1/chat/completions", case.text + END, bursts, **body).json()["choices"]
    assert choice["message"]["content"] == "one ST two "
    assert text_of(choice["logprobs"]["content"]) == "one ST two "


def test_as_many_alternatives_as_were_asked_for() -> None:
    text = "t</think>Hi" + END
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    (choice,) = ask("/v1/chat/completions", text, [1], **body).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], len(first["top_logprobs"])) == ("H", -0.25, 2)
    assert text_of(choice["logprobs"]["other"]) == "t</think>"

    response = ask("/v1/responses", text, [1], input="x", top_logprobs=3).json()
    (part,) = response["output"][1]["content"]
    assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [3, 3]
    assert response["top_logprobs"] == 3
    unasked = ask("/v1/responses", text, [1], input="x").json()
    assert unasked["output"][1]["content"][0]["logprobs"] == []
