"""A real server process over a scripted engine: signals, draining, clients that leave."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

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


def test_draining_has_an_end() -> None:
    def read_and_signal(url: str, process: subprocess.Popen[str]) -> None:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            list(lines)

    with running_server(drain_seconds=0) as (url, process):
        with pytest.raises(httpx.RemoteProtocolError):
            read_and_signal(url, process)
        assert process.wait(timeout=30) == 0


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
