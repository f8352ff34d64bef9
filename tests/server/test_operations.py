"""Keys, origins, limits, ids, logs, metrics and health, through the application and with a scripted engine."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from stepflash.assistant.session import Session
from stepflash.errors import ConfigError, EngineError, QueueFull
from stepflash.server import logs
from stepflash.server.app import create_app
from stepflash.server.health import HealthCheck
from stepflash.server.keys import read_key_file
from stepflash.server.limits import Bucket
from stepflash.server.tracing import spans_to
from stepflash.settings import ServerSettings
from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.in_process import Client, client_of

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
SECRET = "the words that nobody else may read"
HELLO = [{"role": "user", "content": SECRET}]
CHAT_BODY: dict[str, Any] = {"messages": HELLO}
MESSAGES_BODY: dict[str, Any] = {"messages": HELLO, "max_tokens": 50}
BODIES = {CHAT: CHAT_BODY, MESSAGES: MESSAGES_BODY}


async def posted_together(client: Client, path: str, count: int, **options: Any) -> list[httpx.Response]:
    tasks = [client._request("POST", path, json=BODIES[path], **options) for _ in range(count)]
    return list(await asyncio.gather(*tasks))


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


# Keys


def test_every_route_but_health_needs_a_key() -> None:
    session = scripted_session("x" + END)
    app = create_app(session, "scripted", settings=ServerSettings(api_keys=("one", "two Alice")))
    client = Client(app)
    num_guarded = 0
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            request = client._request(method.upper(), path.replace("{", "").replace("}", ""), json={})
            status = asyncio.run(request).status_code
            assert status == (200 if path == "/health" else 401), (method, path)
            num_guarded += status == 401
    assert num_guarded >= 14
    for path in ("/", "/page/chat.js", "/openapi.json", "/nowhere", "/health/"):
        assert client.get(path).status_code == 401
    for headers in (
        {"authorization": "Bearer one"},
        {"x-api-key": "two"},
        {"authorization": "Basic " + "YW55Ym9keTp0d28="},
        {"authorization": "Bearer wrong", "x-api-key": "one"},
    ):
        assert client.get("/v1/models", headers=headers).status_code == 200
    for value in ("Bearer", "Bearer ", "Bearer two Alice", "Bearer Alice", "one", "Basic !", "Bearer \u00e9"):
        headers = {"authorization": value.encode("latin-1")}  # type: ignore[dict-item]
        assert client.get("/v1/models", headers=headers).status_code == 401, value


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nalpha\n\n  beta Bob \n")
    assert read_key_file(file) == ("alpha", "beta Bob")
    for text in ("", "# nothing\n", "a b c\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=str(file)):
            read_key_file(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_key_file(tmp_path / "missing")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_key_file(file)


# Origins


def test_pages_of_others_are_kept_out() -> None:
    client = client_of(scripted_session("x" + END))
    foreign = {"origin": "https://evil.example"}
    response = client.post(CHAT, json=CHAT_BODY, headers=foreign)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    # The page that the server itself sends is of no foreign origin.
    assert client.post(CHAT, json=CHAT_BODY, headers={"origin": "http://test"}).status_code == 200
    preflight = {**foreign, "access-control-request-method": "POST"}
    response = asyncio.run(client._request("OPTIONS", CHAT, headers=preflight))
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),
        ("workstation:8000", True),
        ("workstation.local:8000", True),
        ("rebound.example:8000", False),
        ("127.0.0.1.rebound.example", False),
        ("localhost.rebound.example:8000", False),
    ],
)
def test_a_name_that_anybody_could_let_point_here_is_foreign_without_keys(host: str, is_own: bool) -> None:
    headers = {"origin": f"http://{host}", "host": host}

    def status(**settings: Any) -> int:
        key = {"x-api-key": "key"} if "api_keys" in settings else {}
        client = client_of(scripted_session("x" + END), **settings)
        return client.post(CHAT, json=CHAT_BODY, headers=headers | key).status_code

    assert status() == (200 if is_own else 403)
    assert status(cors_origins=(f"http://{host}",)) == 200
    assert status(api_keys=("key",)) == 200


def test_pages_that_are_named_are_let_in() -> None:
    client = client_of(scripted_session("x" + END), cors_origins=("https://chat.example",), api_keys=("key",))
    origin = {"origin": "https://chat.example"}
    # The question before the question carries no key.
    preflight = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key",
    }
    response = asyncio.run(client._request("OPTIONS", CHAT, headers=preflight))
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-api-key" in response.headers["access-control-allow-headers"]
    for key, status in (("key", 200), ("wrong", 401)):
        response = client.post(CHAT, json=CHAT_BODY, headers={**origin, "x-api-key": key})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        readable = response.headers["access-control-expose-headers"].split(", ")
        assert {name for name in response.headers if name.startswith("x-stepflash-")} <= set(readable)
    assert "x-stepflash-prompt-tokens" in readable
    other = {"origin": "https://chat.example.evil", "x-api-key": "key"}
    assert client.post(CHAT, json=CHAT_BODY, headers=other).status_code == 403


# Limits


@pytest.mark.parametrize(
    ("path", "status", "kind"), [(CHAT, 429, "rate_limit_error"), (MESSAGES, 529, "overloaded_error")]
)
def test_a_full_queue_refuses_and_says_when_to_come_back(path: str, status: int, kind: str) -> None:
    session = scripted_session("some words" + END, pause=0.01)
    client = client_of(session, max_open_answers=3)
    responses = asyncio.run(posted_together(client, path, 8))
    assert sorted(response.status_code for response in responses) == [200] * 3 + [status] * 5
    for response in responses:
        if response.status_code == status:
            assert error_of(response)["type"] == kind
            assert int(response.headers["retry-after"]) >= 1
    # The places are free again, for streams too, and choices count one by one.
    body = {**CHAT_BODY, "n": 3, "stream": True}
    for _ in range(3):
        assert client.post(CHAT, json=body).status_code == 200
    # Waiting would not help here.
    response = client.post(CHAT, json={**CHAT_BODY, "n": 4})
    assert (response.status_code, error_of(response)["param"]) == (400, "n")


def test_compressed_bodies_are_refused_by_name() -> None:
    client = client_of(scripted_session("x" + END))
    for path, body in BODIES.items():
        content, headers = gzip.compress(json.dumps(body).encode()), {"content-encoding": "gzip"}
        response = client.post(path, content=content, headers=headers)
        assert (response.status_code, "gzip" in error_of(response)["message"]) == (415, True)


def test_one_client_may_not_take_everything() -> None:
    session = scripted_session("some words" + END, pause=0.01)
    client = client_of(session, max_requests_per_client=2, api_keys=("a", "b"))

    async def main() -> None:
        of_a = posted_together(client, CHAT, 5, headers={"x-api-key": "a"})
        of_b = posted_together(client, MESSAGES, 2, headers={"x-api-key": "b"})
        first, second = await asyncio.gather(of_a, of_b)
        assert sorted(response.status_code for response in first) == [200, 200, 429, 429, 429]
        assert [response.status_code for response in second] == [200, 200]

    asyncio.run(main())
    assert client.post(CHAT, json=CHAT_BODY, headers={"x-api-key": "a"}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_requests_a_minute(path: str) -> None:
    client = client_of(scripted_session("x" + END), requests_per_minute=2)
    statuses = [client.post(path, json=BODIES[path]).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    response = client.post(path, json=BODIES[path])
    assert error_of(response)["type"] == "rate_limit_error"
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert client.get("/v1/models").status_code == 200


def test_tokens_a_minute_are_charged_when_they_are_known() -> None:
    client = client_of(scripted_session("word " * 40 + END), tokens_per_minute=100)
    assert client.post(CHAT, json=CHAT_BODY).status_code == 200
    response = client.post(CHAT, json=CHAT_BODY)
    assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")
    assert int(response.headers["retry-after"]) > 60


def test_a_bucket_refills_evenly() -> None:
    bucket = Bucket(60, now=100.0)
    bucket.take(60)
    assert bucket.wait_seconds(1, now=100.0) == pytest.approx(1.0)
    assert bucket.wait_seconds(1, now=100.5) == pytest.approx(0.5)
    assert bucket.wait_seconds(1, now=101.0) == 0.0
    # No more than a minute's worth is ever saved up.
    assert bucket.wait_seconds(61, now=10_000.0) == pytest.approx(1.0)


def test_answers_are_no_longer_than_the_server_allows() -> None:
    client = client_of(scripted_session("word " * 40 + END), max_output_tokens=7)
    for limit in ({}, {"max_tokens": 5000}):
        reply = client.post(CHAT, json={**CHAT_BODY, **limit}).json()
        assert reply["usage"]["completion_tokens"] == 7
        assert reply["choices"][0]["finish_reason"] == "length"
    reply = client.post(CHAT, json={**CHAT_BODY, "max_tokens": 3}).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert client.post(MESSAGES, json=MESSAGES_BODY).json()["stop_reason"] == "max_tokens"


def test_a_body_that_never_comes_is_given_up() -> None:
    app = create_app(scripted_session("x"), "scripted", settings=ServerSettings(body_seconds=0.05))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append({})
            return {"type": "http.request", "body": b'{"messages": [', "more_body": True}
        await asyncio.sleep(60)
        raise AssertionError

    answers: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        answers.append(message)

    asyncio.run(asyncio.wait_for(app(_scope(), receive, send), 20))
    assert answers[0]["status"] == 408


def test_a_client_that_leaves_while_it_sends_is_no_failure() -> None:
    app = create_app(scripted_session("x"), "scripted")
    messages = [
        {"type": "http.request", "body": b'{"messages"', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None: ...

    asyncio.run(asyncio.wait_for(app(_scope(), receive, send), 20))
    assert 'stepflash_requests_total{route="/v1/chat/completions",status="499"} 1.0' in metrics(Client(app))


def test_a_client_that_takes_nothing_is_left() -> None:
    """Its buffer is full: the frame is not taken, the stream ends, and with it the request in the engine."""
    session = scripted_session("x" * 50, pause=0.01)

    async def run() -> float:
        app = create_app(session, "scripted", settings=ServerSettings(send_seconds=0.2))
        body = json.dumps({**CHAT_BODY, "stream": True}).encode()
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not request:
                await asyncio.sleep(60)
            return request.pop()

        num_sent = 0

        async def send(message: Any) -> None:
            nonlocal num_sent
            num_sent += 1
            if num_sent > 3:
                await asyncio.sleep(60)

        started = time.monotonic()
        await asyncio.wait_for(app(_scope(), receive, send), 20)
        return time.monotonic() - started

    assert 0.2 <= asyncio.run(run()) < 10
    assert len(engine_of(session).aborted) == 1


def _scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }


# Ids, logs, traces


def test_every_answer_has_an_id() -> None:
    client = client_of(scripted_session("x" + END), api_keys=("key",))
    ids = set()
    for path, key in ((CHAT, "key"), (MESSAGES, "key"), (CHAT, "wrong"), ("/nowhere", "key")):
        response = client.post(path, json=BODIES.get(path, {}), headers={"x-api-key": key})
        assert response.headers["request-id"] == response.headers["x-request-id"]
        ids.add(response.headers["request-id"])
    assert len(ids) == 4
    given = {"x-request-id": "my-id.7"}
    assert client.get("/health", headers=given).headers["x-request-id"] == "my-id.7"
    for bad in ("a" * 200, 'with "quotes"', "with space"):
        assert client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def logged(session: Session, **options: Any) -> list[dict[str, Any]]:
    """What is logged about one of each, as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    logs.access_log.addHandler(handler)
    logs.access_log.setLevel(logging.INFO)
    try:
        client = client_of(session, api_keys=("the-key Alice",), **options)
        for path in BODIES:
            client.post(path, json=BODIES[path], headers={"x-api-key": "the-key"})
        client.post(CHAT, json={**CHAT_BODY, "temperature": SECRET}, headers={"x-api-key": "the-key"})
        client.post(f"/{SECRET}", headers={"x-api-key": "bad-key"})
        client.get("/health")
    finally:
        logs.access_log.removeHandler(handler)
        logs.access_log.setLevel(logging.NOTSET)
    assert "the-key" not in stream.getvalue()
    assert "bad-key" not in stream.getvalue()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_log_lines_tell_all_but_the_words() -> None:
    chat, messages, wrong, unknown = logged(scripted_session("abc" + END))
    assert chat["route"] == CHAT
    assert (chat["client"], chat["status"], chat["finish_reason"]) == ("Alice", 200, "stop")
    assert chat["completion_tokens"] == 4
    assert chat["prompt_tokens"] > 0
    assert chat["request_id"].startswith("req_")
    assert {"queue_seconds", "first_token_seconds", "seconds", "time", "level"} <= chat.keys()
    assert messages["route"] == MESSAGES
    assert (wrong["status"], unknown["status"], unknown["route"]) == (400, 401, "other")
    assert SECRET not in json.dumps([chat, messages, wrong, unknown])


def test_prompts_are_logged_on_demand() -> None:
    chat, *_ = logged(scripted_session("abc" + END), log_prompts=True)
    assert SECRET in chat["prompts"][0]


def test_a_failure_is_one_json_line_with_its_traceback() -> None:
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "it %s", ("failed",), None)
    try:
        raise ValueError("why")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    data = json.loads(logs.JsonFormatter().format(record))
    assert (data["level"], data["message"]) == ("error", "it failed")
    assert "ValueError: why" in data["traceback"]
    assert "ValueError: why" in logs.TextFormatter().format(record)


def test_spans_join_the_trace_of_the_caller() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(scripted_session("abc" + END), "scripted", on_closed=[spans_to(provider)])
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    Client(app).post(CHAT, json=CHAT_BODY, headers=headers)
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == trace_id
    assert span.name == f"POST {CHAT}"
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.output_tokens"] == 4
    assert span.attributes["http.response.status_code"] == 200
    assert span.end_time is not None
    assert span.start_time is not None
    assert 0 < span.end_time - span.start_time < 60e9
    assert SECRET not in str(span.to_json())


# Metrics


def metrics(client: Client, **options: Any) -> str:
    response = client.get("/metrics", **options)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return response.text


def test_what_keys_and_limits_refuse_is_counted_by_route() -> None:
    client = client_of(scripted_session("x" + END), api_keys=("a", "b"), requests_per_minute=1)
    for path in (CHAT, CHAT, f"/v1/responses/{SECRET}/cancel", f"/{SECRET}"):
        client.post(path, json=CHAT_BODY, headers={"x-api-key": "a"})
    client.get("/v1/models")
    text = metrics(client, headers={"x-api-key": "b"})
    for route, status in ((CHAT, 200), (CHAT, 429), ("/v1/models", 401)):
        assert f'stepflash_requests_total{{route="{route}",status="{status}"}} 1.0' in text
    assert 'route="/v1/responses/{response_id}/cancel"' in text
    assert 'route="other"' in text
    assert SECRET not in text


def test_metrics_add_up() -> None:
    session = scripted_session("some words" + END, "cut", bursts=[4])
    client = client_of(session)
    client.post(CHAT, json={**CHAT_BODY, "stream": True})
    client.post(MESSAGES, json=MESSAGES_BODY)
    client.post(CHAT, json={"messages": []})
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics(client))
        for sample in family.samples
    }
    assert samples["stepflash_requests_total", CHAT, "200"] == 1
    assert samples["stepflash_requests_total", MESSAGES, "200"] == 1
    assert samples["stepflash_requests_total", CHAT, "400"] == 1
    assert samples["stepflash_answers_total", "stop"] == 1
    assert samples["stepflash_answers_total", "length"] == 1
    assert samples["stepflash_tokens_total", "generated"] == 11 + 3
    assert samples["stepflash_tokens_total", "cached"] == 2
    # Bursts of 4, 4, 3 and of 3 tokens: one token of each burst was not drafted.
    assert samples["stepflash_tokens_total", "accepted"] == 3 + 3 + 2 + 2
    for name, count in (("queue", 2), ("first_token", 2), ("inter_token", 2), ("answer", 2)):
        assert samples[f"stepflash_{name}_seconds_count",] == count
        assert samples[f"stepflash_{name}_seconds_bucket", "+Inf"] == count
    assert samples["stepflash_running_answers",] == 0


def test_every_end_of_an_answer_is_counted() -> None:
    broken = client_of(scripted_session("some words" + END, error="boom", error_after=2))
    assert broken.post(CHAT, json=CHAT_BODY).status_code == 500
    assert 'stepflash_answers_total{finish_reason="error"} 1.0' in metrics(broken)
    assert 'stepflash_requests_total{route="/v1/chat/completions",status="500"} 1.0' in metrics(broken)
    streamed = broken.post(CHAT, json={**CHAT_BODY, "stream": True})
    assert streamed.status_code == 200
    assert 'stepflash_requests_total{route="/v1/chat/completions",status="500"} 2.0' in metrics(broken)


def test_a_bug_is_one_request_s_and_has_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted_session("x" + END)
    client = client_of(session)

    def bug(*args: Any, **options: Any) -> Any:
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(session, "prepare", bug)
        for path, body in BODIES.items():
            response = client.post(path, json=body)
            assert response.status_code == 500
            assert error_of(response)["message"] == "internal error"
            assert response.headers["request-id"].startswith("req_")
    assert client.post(CHAT, json=CHAT_BODY).status_code == 200


# Health


class _Stats:
    num_generated_tokens = 0
    num_computed_prompt_tokens = 0


def check_health(session: Session, **options: Any) -> Any:
    return asyncio.run(HealthCheck(session, **options).check())


def test_health_is_one_generated_token(monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted_session("x" + END)
    health = check_health(session)
    assert (health.is_ok, health.status) == (True, "ok")
    health = check_health(scripted_session("x", error="no weights"))
    assert (health.is_ok, health.status) == (False, "no weights")


def test_many_who_ask_share_one_check() -> None:
    session = scripted_session("x" + END, pause=0.05)

    async def main() -> None:
        check = HealthCheck(session)
        await asyncio.gather(*(check.check() for _ in range(20)))
        await check.check()

    asyncio.run(main())
    assert len(session.engine.requests) == 1  # type: ignore[attr-defined]


def test_a_busy_engine_is_not_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted_session("x" + END, pause=60.0)
    stats = _Stats()
    monkeypatch.setattr(session.engine, "stats", lambda: stats)
    health = check_health(session, limit_seconds=0.3)
    assert (health.is_ok, health.status) == (False, "no token within 0.3 seconds")

    async def moving() -> Any:
        asyncio.get_running_loop().call_later(0.1, setattr, stats, "num_computed_prompt_tokens", 512)
        return await HealthCheck(session, limit_seconds=30).check()

    started = time.monotonic()
    assert asyncio.run(moving()).status == "busy"
    assert time.monotonic() - started < 20

    def full(request: object) -> Any:
        raise QueueFull("full", 1.0)

    monkeypatch.setattr(session.engine, "submit", full)
    stats.num_computed_prompt_tokens = 0
    assert asyncio.run(moving()).status == "busy"
    assert not check_health(session, limit_seconds=0.3).is_ok

    def dead(request: object) -> Any:
        raise EngineError("the engine is closed")

    monkeypatch.setattr(session.engine, "submit", dead)
    assert check_health(session).status == "the engine is closed"
