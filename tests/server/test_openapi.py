"""The OpenAPI description holds for whatever a generator makes of it: no 5xx, no hang, errors of the API's form.

Schemathesis makes the requests. The engine is a scripted one, so that all the time goes into the server.
"""

from __future__ import annotations

import asyncio
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.generation import GenerationMode

from stepflash.server.app import create_app
from stepflash.server.openapi import BODIES
from stepflash.settings import ServerSettings
from tests.scripted_engine import END, scripted_session
from tests.server.in_process import Client

SECONDS = 20.0


def new_app(**options: Any) -> Any:
    session = scripted_session("<think>\nwell\n</think>\nsome words" + END, bursts=[3])
    return create_app(session, "scripted", settings=ServerSettings(**options))


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", new_app())
OPERATIONS = [operation.ok() for operation in SCHEMA.get_all_operations()]


def check(operation: Any, mode: GenerationMode, max_examples: int) -> dict[int, int]:
    """Call one operation with generated requests; how often each status came."""
    client = Client(new_app())
    statuses: dict[int, int] = {}

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=max_examples,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        options = case.as_transport_kwargs(base_url="http://test")
        method, url = options.pop("method"), options.pop("url")
        options = {
            name: options[name]
            for name in ("headers", "params", "json", "content", "data")
            if name in options
        }
        if isinstance(options.get("data"), bytes):
            options["content"] = options.pop("data")
        response = asyncio.run(asyncio.wait_for(client._request(method, url, **options), SECONDS))
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code == 500 and '"the constraint ' in response.text:
            return  # a format was asked for, and the script, which is no model, does not keep to it
        assert response.status_code < 500, (method, url, options, response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"], response.text
            assert ("type" in response.json()) == operation.path.startswith("/v1/messages")

    run()
    return statuses


def takes_body(operation: Any) -> bool:
    """Only a body can be wrong: what stands in a path is text, whatever it is."""
    return bool(list(operation.body))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_generated_requests(operation: Any) -> None:
    assert check(operation, GenerationMode.POSITIVE, 6)
    if takes_body(operation):
        check(operation, GenerationMode.NEGATIVE, 6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_many_generated_requests(operation: Any, mode: GenerationMode) -> None:
    if mode == GenerationMode.POSITIVE or takes_body(operation):
        check(operation, mode, 200)


def test_every_post_says_what_it_takes() -> None:
    description = new_app().openapi()
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            takes = "requestBody" in operation
            assert takes == (method == "post" and path in BODIES), (method, path)
            assert "422" not in operation["responses"]
    names = set(description["components"]["schemas"])
    assert {"ChatBody", "MessagesBody", "ResponsesBody", "CompletionBody"} <= names


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("where", ["alone", "messages", "unknown field", "an object"])
def test_deep_nesting_is_a_client_error(path: str, where: str) -> None:
    deep = b"[" * 100_000
    body = {
        "alone": deep,
        "messages": b'{"messages": ' + deep + b"]" * 100_000 + b"}",
        "unknown field": b'{"extra": ' + deep + b"]" * 100_000 + b"}",
        "an object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    }[where]
    response = Client(new_app()).post(path, content=body)
    assert response.status_code == 400
    assert "error" in response.json()
