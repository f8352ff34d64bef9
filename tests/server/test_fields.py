"""Every field of every API is judged once: the table in docs/api.md says what the code does, and both know all fields
of the official packages, so that one that is new there fails here until somebody has decided about it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typing_extensions

from stepflash.server.body import Body
from stepflash.server.openapi import BODIES
from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.in_process import client_of

TABLE = Path(__file__).parents[2] / "docs" / "api.md"
# The column of the table for each route, and a body that is right.
COLUMNS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages",
    "/tokenize": "prompts",
    "/apply-template": "prompts",
    "/detokenize": "prompts",
    "/cache/explain": "prompts",
}
HELLO = [{"role": "user", "content": "hello"}]
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 50},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"messages": HELLO},
    "/apply-template": {"messages": HELLO},
    "/detokenize": {"tokens": [1]},
    "/cache/explain": {"messages": HELLO},
}
# Types of the official packages: what they send to each route.
SENT = [
    ("/v1/chat/completions", "openai.types.chat.completion_create_params", "CompletionCreateParams"),
    ("/v1/completions", "openai.types.completion_create_params", "CompletionCreateParams"),
    ("/v1/responses", "openai.types.responses.response_create_params", "ResponseCreateParams"),
    ("/v1/messages", "anthropic.types.message_create_params", "MessageCreateParams"),
    ("/v1/messages", "anthropic.types.beta.message_create_params", "MessageCreateParams"),
    ("/v1/messages/count_tokens", "anthropic.types", "MessageCountTokensParams"),
    ("/v1/messages/count_tokens", "anthropic.types.beta", "MessageCountTokensParams"),
]
# Objects whose own fields are judged one by one.
OBJECTS = {
    "stream_options",
    "reasoning",
    "text",
    "thinking",
    "output_config",
    "prompt_cache_options",
    "tool_choice",
}
TOOLS = [
    ("chat", "openai.types.chat", "ChatCompletionFunctionToolParam"),
    ("chat", "openai.types.chat", "ChatCompletionCustomToolParam"),
    ("responses", "openai.types.responses", "FunctionToolParam"),
    ("responses", "openai.types.responses", "CustomToolParam"),
    ("responses", "openai.types.responses", "NamespaceToolParam"),
    ("messages", "anthropic.types", "ToolParam"),
    ("messages", "anthropic.types.beta", "BetaToolParam"),
]


def read_table() -> dict[str, dict[str, str]]:
    """The judgement of each field, by column."""
    text = TABLE.read_text().partition("## Fields of requests")[2]
    lines = [line for line in text.partition("\n### ")[0].splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in lines[0].split("|")[2:-2]]
    judged: dict[str, dict[str, str]] = {column: {} for column in columns}
    for line in lines[2:]:
        cells = line.split("|")
        assert len(cells) == len(columns) + 4, line
        for name in re.findall(r"`([^`]+)`", cells[1]):
            for column, cell in zip(columns, cells[2:], strict=False):
                assert name not in judged[column], f"{name} stands in the table twice"
                if cell.strip():
                    judged[column][name] = cell.strip()
    return judged


JUDGED = read_table()


def post(path: str, **fields: Any) -> tuple[Any, Any]:
    """The response, and the engine's request if there was one."""
    session = scripted_session("hm\n</think>\nHi" + END)
    response = client_of(session).post(path, json={**RIGHT[path], **fields})
    requests = engine_of(session).requests
    return response, requests[0] if requests else None


def test_the_table_has_only_its_words() -> None:
    words = {word for judgements in JUDGED.values() for word in judgements.values()}
    assert words == {"yes", "hint", "ignored", "refused"}
    assert set(COLUMNS) == set(BODIES) == set(RIGHT)


@pytest.mark.parametrize("column", JUDGED)
def test_the_table_is_what_the_bodies_say(column: str) -> None:
    bodies = [body for path, body in BODIES.items() if COLUMNS[path] == column]
    declared = {name for body in bodies for name in body.model_fields}
    refused = {name for body in bodies for name in body.refused}
    ignored = {name for body in bodies for name in body.ignored}
    named = JUDGED[column]
    assert {name for name, word in named.items() if word in ("yes", "hint") and "." not in name} == declared
    top = {name for name, word in named.items() if word == "refused" and "." not in name}
    assert top == {name for name in refused if "." not in name}
    assert all(named[name] == "refused" for name in refused)
    assert {name for name, word in named.items() if word == "ignored" and "." not in name} == ignored
    for name in named:
        parent = name.partition(".")[0]
        assert parent == name or parent in named, f"{name}: no row for {parent}"


def typed_dicts(annotation: Any) -> Iterator[Any]:
    """The TypedDicts in a union, a list or alone."""
    if typing_extensions.is_typeddict(annotation):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from typed_dicts(part)


def fields_of(annotation: Any) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    for typed_dict in typed_dicts(annotation):
        for name, part in typing_extensions.get_type_hints(typed_dict).items():
            fields.setdefault(name, []).append(part)
    return fields


def packages_type(module: str, name: str) -> Any:
    pytest.importorskip(module.partition(".")[0], reason="the official package is not installed")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("path", "module", "name"), SENT)
def test_every_field_of_the_official_packages_is_judged(path: str, module: str, name: str) -> None:
    named = JUDGED[COLUMNS[path]]
    fields = fields_of(packages_type(module, name))
    assert len(fields) > 10
    inner = {
        f"{field}.{part}"
        for field, types in fields.items()
        if field in OBJECTS and named.get(field) != "refused"
        for type_ in types
        for part in fields_of(type_)
    }
    assert sorted({*fields, *inner} - set(named)) == []


@pytest.mark.parametrize(("column", "module", "name"), TOOLS)
def test_every_field_of_their_tools_is_judged(column: str, module: str, name: str) -> None:
    fields = {f"tools.{field}" for field in fields_of(packages_type(module, name))}
    assert sorted(fields - set(JUDGED[column])) == []


REFUSED = [(path, name) for path, body in BODIES.items() for name in body.refused]


@pytest.mark.parametrize(("path", "name"), REFUSED)
def test_refused_fields_are_refused_unless_harmless(path: str, name: str) -> None:
    refusal = BODIES[path].refused[name]
    parent, _, inner = name.partition(".")

    def body(value: Any) -> dict[str, Any]:
        return {parent: {inner: value} if inner else value}

    for value in (None, False, [], *refusal.harmless):
        assert post(path, **body(value))[0].status_code == 200, value
    for value in ("something", {"a": 1}, ["x"], 77):
        response, request = post(path, **body(value))
        error = response.json()["error"]
        assert (response.status_code, request) == (400, None)
        assert error["message"] == f"{name}: {refusal.reason}"
        assert error["type"] == "invalid_request_error"
        assert path.startswith("/v1/messages") or error["param"] == name


IGNORED = [(path, name) for path, body in BODIES.items() for name in sorted(body.ignored)]


@pytest.mark.parametrize(("path", "name"), IGNORED)
def test_ignored_fields_change_nothing(path: str, name: str) -> None:
    for value in ("something", {"type": "x"}, 77, True):
        response, request = post(path, **{name: value})
        plain_response, plain_request = post(path)
        assert response.status_code == 200
        assert "x-stepflash-ignored-fields" not in response.headers
        if request is None:
            assert response.json() == plain_response.json()
        else:
            assert request.prompt_token_ids == plain_request.prompt_token_ids
            assert request.sampling == plain_request.sampling


@pytest.mark.parametrize("path", BODIES)
def test_fields_that_nobody_knows_are_named(path: str) -> None:
    response, _ = post(path, temprature=0, **{"a,b\r\nx: \u65e5": 1})
    assert response.status_code == 200
    assert response.headers["x-stepflash-ignored-fields"] == "temprature, a?b??x:??"
    assert "x-stepflash-ignored-fields" not in post(path)[0].headers
    many = post(path, **{f"field_{index}" * 20: 1 for index in range(1000)})[0]
    assert len(many.headers["x-stepflash-ignored-fields"]) < 1000


def test_a_refusal_tells_numbers_from_truth() -> None:
    class Small(Body):
        refused = BODIES["/v1/messages"].refused

    refusal = Small.refused["n"]
    assert refusal.holds_of(True)
    assert refusal.holds_of(2)
    assert refusal.holds_of(0)
    assert not refusal.holds_of(1)
    assert not refusal.holds_of(1.0)


VERBOSE = [
    ("/v1/chat/completions", lambda level: {"verbosity": level}, "verbosity"),
    ("/v1/responses", lambda level: {"text": {"verbosity": level}}, "text.verbosity"),
]


@pytest.mark.parametrize(("path", "fields", "param"), VERBOSE)
def test_verbosity_is_a_sentence_of_the_system_message(path: str, fields: Any, param: str) -> None:
    def prompt(level: Any, **more: Any) -> str:
        session = scripted_session("hm\n</think>\nHi" + END)
        client_of(session).post(path, json={**RIGHT[path], **fields(level), **more})
        return session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids)

    assert prompt("medium") == prompt(None)
    assert "<|im_start|>system\nKeep your answers short.<|im_end|>\n<|im_start|>user" in prompt("low")
    system = {"role": "system", "content": "Be kind."}
    name = "input" if path == "/v1/responses" else "messages"
    assert "system\nBe kind.\n\nAnswer at length" in prompt("high", **{name: [system, *HELLO]})
    for level in ("loud", 3, {}):
        if path == "/v1/chat/completions" and not isinstance(level, str):
            continue
        response, _ = post(path, **fields(level))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_extensions_mean_the_same_in_all_apis(path: str) -> None:
    given = {
        "top_k": 7,
        "min_p": 0.1,
        "seed": 5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "draft_depth": 2,
        "ignore_eos": True,
    }
    _, request = post(path, **given, logit_bias={"5": -3.0}, stop_token_ids=[9])
    assert {name: getattr(request.sampling, name) for name in given} == given
    assert (request.sampling.logit_bias, request.sampling.stop_token_ids) == ({5: -3.0}, (9,))
    _, request = post(path, chat_template_kwargs={"enable_thinking": False})
    assert request.constraint is None
    for extension in ({"guided_regex": "Hi"}, {"structured_outputs": {"choice": ["Hi"]}}):
        assert post(path, **extension)[1].constraint is not None
    response, _ = post(path, guided_regex="a", guided_choice=["a"])
    assert response.status_code == 400
    assert "guided_choice" in json.dumps(response.json())
