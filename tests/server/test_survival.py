"""The server over a real engine when something breaks: a request, the engine's thread, the process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepflash.assistant.local import open_session
from stepflash.assistant.session import Session
from stepflash.engine.core import EngineCore
from stepflash.engine.engine import Engine
from stepflash.server.app import create_app
from stepflash.settings import EngineSettings
from tests.server.in_process import Client

ROOT = Path(__file__).parents[2]
MICRO = ROOT / "tests" / "fixtures" / "micro"
CHAT = "/v1/chat/completions"


def body(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24, **options}


@pytest.fixture
def session() -> Iterator[Session]:
    # In float32 the model's own modules run, and the tests can break them.
    settings = EngineSettings(max_num_seqs=8, max_model_len=2048, dtype="float32")
    with open_session(str(MICRO), settings) as local:
        yield local.session


def engine_of(session: Session) -> Engine:
    assert isinstance(session.engine, Engine)
    return session.engine


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    return str((message["content"], message.get("reasoning_content")))


class Poison:
    """A constraint that allows everything, until it breaks."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._fuse = 6

    def _burn(self, where: str) -> None:
        self._fuse -= where == self._where
        if self._fuse <= 0:
            raise RuntimeError("a grammar that fails")

    def mask(self) -> None:
        self._burn("mask")

    def accept(self, token_id: int) -> None:
        self._burn("accept")

    def rollback(self, num_tokens: int) -> None: ...

    def forced(self) -> tuple[int, ...]:
        self._burn("forced")
        return ()


@pytest.mark.parametrize("where", ["mask", "accept", "forced", "logits"])
def test_a_poisoned_request_fails_alone(
    session: Session, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(create_app(session, "micro"))
    texts = [f"question number {number}" for number in range(4)]
    expected = [content(client.post(CHAT, json=body(text))) for text in texts]
    batches = session.batches

    def poisoned(prompt: Any) -> Any:
        text = session.tokenizer.decode(prompt.request.prompt_token_ids)
        if "poison" in text:
            prompt = replace(prompt, request=replace(prompt.request, constraint=Poison(where)))
        return batches(prompt)

    monkeypatch.setattr(session, "batches", poisoned)
    if where == "logits":
        _break_logits(engine_of(session), monkeypatch, session.tokenizer.encode("poison"))

    async def main() -> list[httpx.Response]:
        asked = [*texts, "poison", "poison two"]
        return list(await asyncio.gather(*(client._request("POST", CHAT, json=body(text)) for text in asked)))

    *good, first, second = asyncio.run(main())
    assert [content(response) for response in good] == expected
    for response in (first, second):
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_error"
    assert content(client.post(CHAT, json=body(texts[0]))) == expected[0]
    assert engine_of(session).num_restarts == 0
    engine_of(session).call(lambda core: core.check_integrity()).result(30)


def _break_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch, poison: list[int]) -> None:
    """A step whose batch holds a poisoned request ends with logits that are not numbers."""
    runner = engine.call(lambda core: core.runner).result(30)
    run_trunk, compute_logits = runner.run_trunk, type(runner.model).compute_logits
    state = {"is_poisoned": False}

    def watched(plan: Any, *rest: Any, **more: Any) -> Any:
        width = len(poison)
        state["is_poisoned"] = any(
            list(item.seq.token_ids[i : i + width]) == poison
            for item in plan
            for i in range(item.seq.num_prompt_tokens)
        )
        return run_trunk(plan, *rest, **more)

    def broken(self: Any, hidden_states: Any) -> Any:
        logits = compute_logits(self, hidden_states)
        return logits * float("nan") if state["is_poisoned"] else logits

    monkeypatch.setattr(runner, "run_trunk", watched)
    monkeypatch.setattr(type(runner.model), "compute_logits", broken)


def test_requests_survive_the_death_of_the_thread(session: Session) -> None:
    client = Client(create_app(session, "micro"))
    expected = content(client.post(CHAT, json=body("hello")))

    def die(core: EngineCore) -> None:
        raise SystemExit("ended from outside")

    async def main() -> list[httpx.Response]:
        long = body("tell me", max_tokens=1500, ignore_eos=True)
        requests = [
            client._request("POST", CHAT, json={**long, "stream": stream}) for stream in (False, True)
        ]
        running = [asyncio.create_task(request) for request in requests]
        while engine_of(session).stats().num_running < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(SystemExit):
            await asyncio.wrap_future(engine_of(session).call(die))
        return list(await asyncio.wait_for(asyncio.gather(*running), 60))

    whole, streamed = asyncio.run(main())
    assert whole.status_code == 500
    assert "restarted" in whole.json()["error"]["message"]
    frames = [line for line in streamed.text.splitlines() if line]
    assert frames[-1] == "data: [DONE]"
    assert "restarted" in json.loads(frames[-2].removeprefix("data: "))["error"]["message"]
    assert content(client.post(CHAT, json=body("hello"))) == expected
    assert client.get("/health").json()["status"] == "ok"
    assert "stepflash_engine_restarts 1.0" in client.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_during_a_long_prompt_costs_one_step_more(
    session: Session, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(session, "micro")
    engine = engine_of(session)
    core = engine.call(lambda core: core).result(30)
    monkeypatch.setattr(core.scheduler, "_max_tokens", 32)
    step, may_go, num_steps = core.step, threading.Semaphore(0), [0]

    def gated() -> Any:
        may_go.acquire()
        num_steps[0] += 1
        return step()

    monkeypatch.setattr(core, "step", gated)
    data = json.dumps(body("word " * 300, stream=stream)).encode()
    has_left = asyncio.Event()
    messages = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    async def main() -> None:
        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
            "headers": [(b"host", b"test")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
            "scheme": "http", "http_version": "1.1", "root_path": "",
        }  # fmt: skip
        request = asyncio.create_task(app(scope, receive, send))
        for _ in range(3):
            may_go.release()
        while engine.stats().num_steps < 3:
            await asyncio.sleep(0.01)
        assert engine.stats().num_running == 1
        assert engine.stats().num_generated_tokens == 0
        has_left.set()
        await asyncio.wait_for(request, 30)
        may_go.release(100)
        deadline = time.monotonic() + 30
        while engine.stats().num_running:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert num_steps[0] <= 4
    stats = engine.stats()
    assert stats.kv_used_bytes == stats.kv_cached_bytes


# ---- kill -9 ---------------------------------------------------------------------------------------------------

# The command itself; only that it saves an idle cache sooner, so that the test need not wait.
SERVE = """
import sys
import stepflash.engine.engine
from stepflash.cli import main
stepflash.engine.engine.IDLE_SECONDS = 0.05
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@contextlib.contextmanager
def serving(cache: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    arguments = [str(MICRO), "--port", "0", "--prefix-cache", str(cache), "--log-format", "off"]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        yield process.stderr.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_killed_server_comes_back_with_its_cache_or_says_why_without(tmp_path: Path) -> None:
    cache = tmp_path / "prefix.safetensors"
    kept, cut = body("a long question " * 20), body("another question " * 20, max_tokens=300, ignore_eos=True)
    with serving(cache) as (line, process):
        url = line.split()[-1]
        first = httpx.post(f"{url}{CHAT}", json=kept, timeout=60)
        deadline = time.monotonic() + 60
        while not cache.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with httpx.stream("POST", f"{url}{CHAT}", json={**cut, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGKILL)
            with contextlib.suppress(httpx.RemoteProtocolError):
                list(lines)
        assert process.wait(30) == -signal.SIGKILL
    (tmp_path / f"{cache.name}.1.partial").write_bytes(b"half of a file")
    with serving(cache) as (line, _):
        url = line.split()[-1]
        again = httpx.post(f"{url}{CHAT}", json=kept, timeout=60)
        assert content(again) == content(first)
        usage = again.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 32
        finished = content(httpx.post(f"{url}{CHAT}", json=cut, timeout=60))
        assert not list(tmp_path.glob("*.partial"))
    with open_session(str(MICRO), EngineSettings()) as local:
        never_killed = Client(create_app(local.session, "micro"))
        assert content(never_killed.post(CHAT, json=cut)) == finished
        assert content(never_killed.post(CHAT, json=kept)) == content(first)
    damaged = bytearray(cache.read_bytes())
    damaged[-1000] ^= 1
    cache.write_bytes(damaged)
    with serving(cache) as (line, process):
        assert "damaged prefix cache (its bytes do not match its checksum)" in line
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        anew = httpx.post(f"{url}{CHAT}", json=kept, timeout=60)
        assert content(anew) == content(first)
        assert anew.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert (tmp_path / f"{cache.name}.damaged").read_bytes() == damaged
