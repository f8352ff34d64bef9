"""`serve --upstream`, from the command line's settings to the APIs: the same answers as without it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepflash.assistant.local import LocalModel, open_session
from stepflash.assistant.remote import open_remote_session
from stepflash.errors import ConfigError
from stepflash.server.app import create_app
from stepflash.settings import EngineSettings
from tests.scripted_engine import byte_tokenizer
from tests.server.in_process import Client
from tests.upstream_stand_in import StandIn, running

MICRO = str(Path(__file__).parents[1] / "fixtures" / "micro")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def local() -> Iterator[LocalModel]:
    with open_session(MICRO, EngineSettings()) as local:
        yield local


@pytest.fixture(params=("vllm", "sglang"))
def stand_in(request: pytest.FixtureRequest, local: LocalModel) -> Iterator[StandIn]:
    engine, tokenizer = local.session.engine, local.session.tokenizer
    with running(
        StandIn(engine=engine, tokenizer=tokenizer, kind=request.param, max_model_len=4096)
    ) as server:
        yield server


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 20, "n": 2}),
    "budget": (
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 80, "thinking": {"type": "enabled", "budget_tokens": 6}},
    ),
    "format": (
        "/v1/completions",
        {"prompt": "hello", "max_tokens": 30, "response_format": {"type": "json_object"}},
    ),
    "text": ("/v1/completions", {"prompt": "hello", "max_tokens": 12, "logprobs": 3}),
    "responses": ("/v1/responses", {"input": "hello", "max_output_tokens": 12}),
    "messages": ("/v1/messages", {"messages": HELLO, "max_tokens": 12, "thinking": {"type": "adaptive"}}),
}
CHANGING = {"id", "created", "created_at", "usage", "call_id", "signature"}


def plain(value: Any) -> Any:
    """Without what differs between two answers that are the same; numbers of a log-probability rounded."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in CHANGING}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_same_answer_through_every_api(
    stand_in: StandIn, local: LocalModel, case: str, stream: bool
) -> None:
    path, body = CASES[case]
    there = open_remote_session(MICRO, f"{stand_in.url}/v1", EngineSettings())
    assert there.name == local.name
    assert there.session.max_context_tokens == local.session.max_context_tokens
    found = []
    for model in (there, local):
        app = create_app(model.session, "micro", defaults=model.sampling)
        answer = Client(app).post(path, json={"temperature": 0, "stream": stream, **body})
        assert answer.status_code == 200, answer.text
        found.append(_texts(answer.text) if stream else plain(answer.json()))
    assert found[0] == found[1]
    assert found[0]


def _texts(stream: str) -> dict[str, str]:
    """The text of a stream by what kind of text it is; how it is cut into events may differ."""
    found: dict[str, str] = {}

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, str) and key in (
                    "content",
                    "reasoning_content",
                    "text",
                    "thinking",
                    "delta",
                ):
                    name = f"{value.get('index', '')}{value.get('type', '')}{key}"
                    found[name] = found.get(name, "") + item
                else:
                    add(item)
        elif isinstance(value, list):
            for item in value:
                add(item)

    for line in stream.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            for choice in event.get("choices", [event]):
                is_delta = isinstance(choice.get("delta"), dict) and "finish_reason" in choice
                add({**choice["delta"], "index": choice["index"]} if is_delta else choice)
    return found


def test_health_and_metrics(stand_in: StandIn) -> None:
    model = open_remote_session(MICRO, stand_in.url, EngineSettings())
    client = Client(create_app(model.session, "micro"))
    assert client.get("/health").json()["status"] == "ok"
    assert "stepflash_engine_num_calls 1.0" in client.get("/metrics").text
    stand_in.statuses = [500]
    model = open_remote_session(MICRO, stand_in.url, EngineSettings())
    answer = Client(create_app(model.session, "micro")).get("/health")
    assert answer.status_code == 503
    assert "told to" in answer.json()["status"]


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"), [(503, 429, 529), (400, 400, 400), (500, 500, 500)]
)
def test_refusals_of_the_upstream_in_the_words_of_the_api(
    stand_in: StandIn, status: int, openai: int, anthropic: int
) -> None:
    model = open_remote_session(MICRO, stand_in.url, EngineSettings())
    client = Client(create_app(model.session, "micro"))
    for path, expected in (("/v1/chat/completions", openai), ("/v1/messages", anthropic)):
        stand_in.statuses = [status] * (3 if status == 503 else 1)
        answer = client.post(path, json={"messages": HELLO, "max_tokens": 4})
        assert answer.status_code == expected
        assert "told to" in answer.json()["error"]["message"]
        if status == 503:
            assert answer.headers["retry-after"] == "7"


def test_another_tokenizer_is_refused(stand_in: StandIn) -> None:
    stand_in.tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="tokenizer is not that of"):
        open_remote_session(MICRO, stand_in.url, EngineSettings())


def test_options_of_the_engine_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization belongs to the server behind"):
        open_remote_session(MICRO, "http://127.0.0.1:9", EngineSettings(quantization="int4"))
