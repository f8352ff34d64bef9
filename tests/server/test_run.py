"""A real server process over a scripted engine: signals, draining, clients that leave."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from stepflash.server.app import create_app
from stepflash.server.request_records import RequestRecord
from tests.scripted_engine import scripted_session
from tests.server.in_process import Client

ROOT = Path(__file__).parents[2]
SCRIPT = """
from stepflash.server.app import create_app
from stepflash.server.run import listen, run_server
from stepflash.settings import ServerSettings
from tests.scripted_engine import scripted_session
settings = ServerSettings(port=0, drain_seconds=DRAIN_SECONDS)
session = scripted_session("word " * 60, bursts=[5], pause=0.02)
with listen(settings) as listener:
    raise SystemExit(run_server(create_app(session, "scripted"), listener, settings, "scripted"))
"""
BODY = {"messages": [{"role": "user", "content": "hello"}], "stream": True}


@contextlib.contextmanager
def running_server(drain_seconds: int = 30) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    script = SCRIPT.replace("DRAIN_SECONDS", str(drain_seconds))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield process.stderr.readline().split()[-1], process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_lets_answers_finish() -> None:
    with running_server() as (url, process):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            received = [line for line in lines if line]
        assert received[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in received[-2]
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_the_second_signal_ends_at_once() -> None:
    def read_and_signal_twice(url: str, process: subprocess.Popen[str]) -> None:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            list(lines)

    with running_server() as (url, process):
        with pytest.raises(httpx.RemoteProtocolError):
            read_and_signal_twice(url, process)
        assert process.wait(timeout=30) == 0


MESSAGES = [{"role": "user", "content": "hello"}]
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES, "n": 2},
    "/v1/completions": {"prompt": "hello", "max_tokens": 1000},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1000},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_at_the_end_of_draining_is_told_why(path: str) -> None:
    """Each API by its own last event; what came before is whole."""
    with running_server(drain_seconds=0) as (url, process):
        body = {**BODIES[path], "stream": True}
        with httpx.stream("POST", f"{url}{path}", json=body, timeout=60) as response:
            lines = response.iter_lines()
            received = [next(lines)]
            process.send_signal(signal.SIGTERM)
            received += lines
        blocks = [block.splitlines() for block in "\n".join(received).strip().split("\n\n")]
        is_named = path in ("/v1/responses", "/v1/messages")
        assert all(block[0].startswith("event: " if is_named else "data: ") for block in blocks)
        if not is_named:
            assert blocks.pop() == ["data: [DONE]"]
        events = [json.loads(block[-1].removeprefix("data: ")) for block in blocks]
        last = events[-1]
        if path == "/v1/responses":
            assert last["type"] == "response.failed"
            assert last["sequence_number"] > events[-2]["sequence_number"]
            last = last["response"]
            assert last["status"] == "failed"
            assert last["error"]["code"] == "server_error"
        elif path == "/v1/messages":
            assert last["type"] == "error"
            assert last["error"]["type"] == "overloaded_error"
        else:
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "server_closing")
        assert "going down" in last["error"]["message"]
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_at_the_end_of_draining_is_503(path: str) -> None:
    with running_server(drain_seconds=0) as (url, process), httpx.Client(timeout=60) as client:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, f"{url}{path}", json=BODIES[path])
            while "stepflash_running_answers 0" in httpx.get(f"{url}/metrics").text:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            response = answer.result(60)
        assert response.status_code == 503
        assert "going down" in response.json()["error"]["message"]
        assert process.wait(timeout=30) == 0


def test_a_reader_that_stands_still_does_not_keep_the_server() -> None:
    body = json.dumps(BODY).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with running_server(drain_seconds=0) as (url, process), socket.socket() as connection:
        connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        connection.sendall(head.encode() + body)
        assert connection.recv(16)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_the_end_reaches_the_log_and_the_metrics() -> None:
    records: list[RequestRecord] = []
    app = create_app(scripted_session("word " * 60, pause=0.05), "scripted", on_closed=(records.append,))

    async def ask(stream: bool) -> httpx.Response:
        return await Client(app)._request("POST", "/v1/chat/completions", json={**BODY, "stream": stream})

    async def main() -> list[httpx.Response]:
        asked = [asyncio.create_task(ask(stream)) for stream in (True, False)]
        await asyncio.sleep(0.3)
        app.state.closing.end()
        return list(await asyncio.gather(*asked, ask(True)))

    responses = asyncio.run(main())
    assert sorted(response.status_code for response in responses) == [200, 503, 503]
    assert [record.status for record in records] == [503, 503, 503]
    assert {answer.finish_reason for record in records for answer in record.answers} == {"abort"}


def test_ctrl_c_on_an_idle_server_is_quiet() -> None:
    with running_server() as (url, process):
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_reader_that_closes_ends_its_answer() -> None:
    with running_server() as (url, _):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, timeout=60) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 30
        while "stepflash_running_answers 0" not in httpx.get(f"{url}/metrics", timeout=60).text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        text = httpx.get(f"{url}/metrics", timeout=60).text
        assert 'stepflash_requests_total{route="/v1/chat/completions",status="499"} 1' in text
