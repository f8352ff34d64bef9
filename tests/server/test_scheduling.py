"""Priorities and deadlines of requests, in every API."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepflash.assistant.local import open_session
from stepflash.assistant.scripted import engine_of
from stepflash.assistant.session import Session
from stepflash.engine.core import EngineCore
from stepflash.engine.engine import Engine
from stepflash.errors import ConfigError
from stepflash.server.app import create_app
from stepflash.server.request_records import RequestRecord
from stepflash.settings import EngineSettings, ServerSettings
from tests.scripted_engine import scripted_session
from tests.server.in_process import Client, client_of, named_events

MICRO = str(Path(__file__).parents[1] / "fixtures" / "micro")
HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hello", "max_tokens": 1000},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 1000},
}
LONG = "<think>\nwell\n</think>\n" + "word " * 100


def engine_core(session: Session) -> EngineCore:
    assert isinstance(session.engine, Engine)
    return session.engine.call(lambda core: core).result(30)


@pytest.mark.parametrize("path", BODIES)
def test_a_priority_needs_a_server_that_has_them(path: str) -> None:
    client = client_of(scripted_session("ok"))
    assert client.post(path, json={**BODIES[path], "priority": 0}).status_code == 200
    refused = client.post(path, json={**BODIES[path], "priority": 1})
    assert refused.status_code == 400
    assert "--scheduling-policy priority" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
def test_a_priority_reaches_the_engine(path: str) -> None:
    session = scripted_session("ok")
    client = client_of(session, scheduling_policy="priority")
    for priority in (-3, 7):
        assert client.post(path, json={**BODIES[path], "priority": priority}).status_code == 200
        assert engine_of(session).requests[-1].priority == priority
    assert client.post(path, json=BODIES[path]).status_code == 200
    assert engine_of(session).requests[-1].priority == 0


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 2**31),
        ("priority", "high"),
        ("priority", 1.5),
        ("deadline_seconds", 0),
        ("deadline_seconds", -1.0),
        ("deadline_seconds", "soon"),
    ],
)
def test_values_that_are_none(path: str, field: str, value: Any) -> None:
    client = client_of(scripted_session("ok"), scheduling_policy="priority")
    answer = client.post(path, json={**BODIES[path], field: value})
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]


def test_lower_priorities_run_first() -> None:
    async def main(app: Any) -> list[str]:
        client, ended = Client(app), []

        async def ask(name: str, **options: Any) -> None:
            body = {**BODIES["/v1/completions"], "ignore_eos": True, **options}
            answer = await client._request("POST", "/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            ended.append(name)

        tasks = []
        # The first keeps the only place while the others arrive.
        for name, options in {
            "first": {"max_tokens": 400, "priority": -9},
            "late": {"max_tokens": 4, "priority": 5},
            "usual": {"max_tokens": 4},
            "urgent": {"max_tokens": 4, "priority": -2},
        }.items():
            tasks.append(asyncio.create_task(ask(name, **options)))
            while app.state.session.engine.stats().num_waiting + bool(ended) < len(tasks) - 1:
                await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        return ended

    with open_session(MICRO, EngineSettings(max_num_seqs=1)) as local:
        app = create_app(local.session, "micro", settings=ServerSettings(scheduling_policy="priority"))
        app.state.session = local.session
        assert asyncio.run(main(app)) == ["first", "urgent", "usual", "late"]


def cut(path: str, answer: httpx.Response) -> dict[str, Any]:
    """What a reply says about its end: the reason, the details of its usage, and whether text came."""
    body = answer.json()
    if path == "/v1/responses":
        usage = body["usage"]["output_tokens_details"]
        return {"reason": body["incomplete_details"]["reason"], "usage": usage, "text": bool(body["output"])}
    if path == "/v1/messages":
        usage = body["usage"]["output_tokens_details"]
        return {"reason": body["stop_reason"], "usage": usage, "text": bool(body["content"])}
    choice, usage = body["choices"][0], body["usage"]["completion_tokens_details"]
    return {
        "reason": choice["finish_reason"],
        "usage": usage,
        "text": bool(choice.get("text") or choice["message"]["content"]),
    }


REASONS = {"/v1/responses": "deadline", "/v1/messages": "max_tokens"}


@pytest.mark.parametrize("path", BODIES)
def test_a_deadline_cuts_the_answer(path: str) -> None:
    records: list[RequestRecord] = []
    session = scripted_session(LONG, bursts=[20], deadline_after=3)
    app = create_app(session, "scripted", on_closed=(records.append,))
    answer = Client(app).post(path, json={**BODIES[path], "deadline_seconds": 30})
    assert answer.status_code == 200, answer.text
    found = cut(path, answer)
    assert found["reason"] == REASONS.get(path, "length")
    assert found["usage"]["deadline_reached"] is True
    assert found["text"]
    assert records[0].answers[0].finish_reason == "deadline"


@pytest.mark.parametrize(
    ("server", "asked", "expected"),
    [(None, None, None), (None, 5.5, 5.5), (60.0, None, 60.0), (60.0, 5, 5), (60.0, 600, 60.0)],
)
@pytest.mark.parametrize("path", BODIES)
def test_the_deadline_is_the_nearer_one(
    path: str, server: float | None, asked: float | None, expected: float | None
) -> None:
    session = scripted_session("ok")
    client = client_of(session, request_timeout=server)
    body = BODIES[path] if asked is None else {**BODIES[path], "deadline_seconds": asked}
    assert client.post(path, json=body).status_code == 200
    assert engine_of(session).requests[-1].deadline_seconds == expected


def test_a_stream_ends_at_its_deadline_as_the_whole_answer_does() -> None:
    client = client_of(scripted_session(LONG, bursts=[20], deadline_after=3))
    options = {"stream": True, "deadline_seconds": 30}
    chat = {**BODIES["/v1/chat/completions"], **options, "stream_options": {"include_usage": True}}
    frames = client.post("/v1/chat/completions", json=chat).text.strip().split("\n\n")
    assert frames.pop() == "data: [DONE]"
    ending, usage = (json.loads(frame.removeprefix("data: ")) for frame in frames[-2:])
    assert ending["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens_details"]["deadline_reached"] is True
    events = named_events(client.post("/v1/responses", json={**BODIES["/v1/responses"], **options}))
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "deadline"}
    events = named_events(client.post("/v1/messages", json={**BODIES["/v1/messages"], **options}))
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"]["output_tokens_details"]["deadline_reached"] is True


def test_an_answer_in_time_says_nothing_of_deadlines() -> None:
    client = client_of(scripted_session("ok"))
    for path, body in BODIES.items():
        answer = client.post(path, json={**body, "deadline_seconds": 60})
        assert answer.status_code == 200
        assert "deadline" not in answer.text


@pytest.mark.parametrize(("path", "status"), [("/v1/chat/completions", 429), ("/v1/messages", 529)])
def test_who_gets_no_token_in_time_may_come_back(
    path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one that holds the only place of the engine, for half a minute if need be."""

    async def main(app: Any) -> httpx.Response:
        client = Client(app)
        long = {"prompt": "hello", "max_tokens": 3000, "ignore_eos": True}
        first = asyncio.create_task(client._request("POST", "/v1/completions", json=long))
        while not app.state.session.engine.stats().num_running:
            await asyncio.sleep(0.001)
        body = {**BODIES[path], "deadline_seconds": 0.05}
        answer = await client._request("POST", path, json=body)
        assert not first.done()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return answer

    with open_session(MICRO, EngineSettings(max_num_seqs=1)) as local:
        app = create_app(local.session, "micro")
        app.state.session = local.session
        core = engine_core(local.session)
        step = core.step

        def slow_step() -> Any:
            time.sleep(0.01)
            return step()

        monkeypatch.setattr(core, "step", slow_step)
        answer = asyncio.run(main(app))
    assert answer.status_code == status
    assert int(answer.headers["retry-after"]) >= 1
    assert "no token came within the 0.05 seconds" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "options", [{"scheduling_policy": "fair"}, {"request_timeout": 0}, {"request_timeout": float("nan")}]
)
def test_settings_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerSettings(**options)
