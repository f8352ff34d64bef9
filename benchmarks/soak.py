"""Does the server stand ten minutes of clients as they are?

    python benchmarks/soak.py [MODEL] [--seconds 600] [--clients 64] [--json FILE]

Starts `stepflash serve` and lets many clients at it at once, each doing one thing after the other, chosen at random:
read a stream, read it slowly, leave in the middle of it, ask without streaming, leave before the answer, send what
no server should take, ask for its health. Half of the streams go to the OpenAI APIs, half to Anthropic's and
`/v1/responses`. Then it must hold:

- every stream that ended is, to the letter, what the same request brought before when it ran alone (greedy);
- no status above 499 but 529, which says that the queue is full, as `--max-open-answers` asks for;
- whatever was malformed got its 4xx, and nothing took longer than two minutes;
- at the end no answer runs, no block of the KV cache is held by a request, the engine was never restarted;
- the memory of the process is what it was when a fifth of the time had passed.

Exit status 1 and a list of what did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 120.0
GROWTH_BYTES, GROWTH_SHARE = 24 << 20, 0.05
QUESTIONS = (
    "What is 17 * 23?",
    "Write the letters of the word window one by one.",
    "Sort these numbers: 9, 4, 7, 1, 12.",
    "Which day comes three days after Monday?",
    "Repeat: the river runs under the bridge.",
    "Tell me something about stones. " * 12,
)
MALFORMED = (
    b"",
    b"{",
    b"[1, 2]",
    b'{"messages": 7}',
    b'{"messages": []}',
    b'{"messages": [{"role": "king", "content": "x"}], "max_tokens": 3}',
    b'{"model": "another", "messages": [{"role": "user", "content": "x"}], "input": "x", "max_tokens": 3}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot", "max_tokens": 3, "input": "x"}',
    b'{"messages": ' + b"[" * 5000,
    b"\xff\xfe\x00",
)


class Gone(Exception):
    """The server closed the connection before the end of its answer."""


@dataclass(frozen=True, slots=True)
class Case:
    """A request that has one right answer."""

    path: str
    body: dict[str, Any]

    def encoded(self, stream: bool) -> bytes:
        return json.dumps({**self.body, "stream": stream}).encode()


def cases() -> list[Case]:
    found = []
    for number, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        tokens = 12 + 9 * number
        greedy = {"temperature": 0, "max_tokens": tokens}
        found.append(Case("/v1/chat/completions", {"messages": messages, **greedy}))
        found.append(Case("/v1/completions", {"prompt": question, "ignore_eos": True, **greedy}))
        found.append(Case("/v1/messages", {"messages": messages, "thinking": {"type": "adaptive"}, **greedy}))
        body = {"input": question, "temperature": 0, "max_output_tokens": max(16, tokens), "store": False}
        found.append(Case("/v1/responses", body))
    return found


# ---- a client that can misbehave -----------------------------------------------------------------------------------


class Connection:
    """One request on a connection of its own, read as slowly as one likes."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request; the status of its answer."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**16)
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\nconnection: close\r\n"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await self._writer.drain()
        line = await self._line()
        self._is_chunked = False
        while header := await self._line():
            self._is_chunked |= header.lower().startswith(b"transfer-encoding: chunked")
        return int(line.split()[1])

    async def pieces(self) -> AsyncIterator[bytes]:
        if not self._is_chunked:
            yield await self._reader.read(-1)
            return
        while size := int(await self._line(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def text(self) -> str:
        return b"".join([piece async for piece in self.pieces()]).decode()

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise Gone
        return line.strip()

    def close(self) -> None:
        self._writer.transport.abort()


def said(path: str, stream: str) -> tuple[str, str]:
    """All words of a streamed answer, and how it ended."""
    words: list[str] = []
    ending = ""
    for line in stream.splitlines():
        if not line.startswith("data: {"):
            continue
        data = json.loads(line.removeprefix("data: "))
        if "error" in data or data.get("type") in ("error", "response.failed"):
            return "".join(words), f"error: {line}"
        if path == "/v1/messages":
            delta = data.get("delta", {})
            words.append(delta.get("text", "") + delta.get("thinking", ""))
            ending = delta.get("stop_reason") or ending
        elif path == "/v1/responses":
            words.append(data["delta"] if data["type"].endswith("text.delta") else "")
            ending = data.get("response", {}).get("status", ending)
        else:
            for choice in data["choices"]:
                delta = choice.get("delta", {})
                words += [delta.get("reasoning_content") or "", delta.get("content") or ""]
                words.append(choice.get("text") or "")
                ending = choice["finish_reason"] or ending
    return "".join(words), ending


# ---- what clients do ----------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """`problems` is empty when everything held. `memory_bytes` is of the server, once a second."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    health_seconds: list[float] = field(default_factory=list)
    num_tokens: float = 0.0

    def problem(self, text: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(text)


class Client:
    def __init__(self, port: int, expected: dict[int, tuple[str, str]], report: Report, seed: int) -> None:
        self._port = port
        self._cases = cases()
        self._expected = expected
        self._report = report
        self._random = random.Random(seed)

    async def run(self, until: float) -> None:
        deeds = (
            self.read,
            self.read_slowly,
            self.leave,
            self.ask,
            self.leave_early,
            self.malform,
            self.check,
        )
        weights = (45, 8, 15, 10, 6, 12, 4)
        while time.monotonic() < until:
            (deed,) = self._random.choices(deeds, weights)
            name = deed.__name__
            connection = Connection(self._port)
            try:
                async with asyncio.timeout(LIMIT_SECONDS):
                    await deed(connection)
                self._report.counts[name] += 1
            except TimeoutError:
                self._report.problem(f"{name} took more than {LIMIT_SECONDS:g} seconds")
            except (Gone, OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
                self._report.problem(f"{name}: {type(error).__name__}: {error}")
            finally:
                if hasattr(connection, "_writer"):
                    connection.close()

    async def _open(self, connection: Connection, case: Case, stream: bool) -> bool:
        """False where the queue was full, which is an answer, too."""
        status = await connection.open("POST", case.path, case.encoded(stream))
        if status == (529 if case.path == "/v1/messages" else 429):
            self._report.counts["queue full"] += 1
            await asyncio.sleep(self._random.uniform(0.3, 1.0))
            return False
        if status != 200:
            self._report.problem(f"{case.path}: status {status}: {(await connection.text())[:200]}")
        return status == 200

    def _any(self) -> tuple[int, Case]:
        number = self._random.randrange(len(self._cases))
        return number, self._cases[number]

    def _compare(self, number: int, stream: str) -> None:
        self._report.counts["streams compared"] += 1
        if (found := said(self._cases[number].path, stream)) != self._expected[number]:
            self._report.problem(f"case {number} was {found!r}, alone it was {self._expected[number]!r}")

    async def read(self, connection: Connection) -> None:
        number, case = self._any()
        if await self._open(connection, case, stream=True):
            self._compare(number, await connection.text())

    async def read_slowly(self, connection: Connection) -> None:
        number, case = self._any()
        if await self._open(connection, case, stream=True):
            pieces = []
            async for piece in connection.pieces():
                pieces.append(piece)
                await asyncio.sleep(self._random.random() * 0.2)
            self._compare(number, b"".join(pieces).decode())

    async def leave(self, connection: Connection) -> None:
        _, case = self._any()
        if await self._open(connection, case, stream=True):
            left = self._random.randrange(1, 12)
            async for _ in connection.pieces():
                left -= 1
                if not left:
                    return

    async def ask(self, connection: Connection) -> None:
        _, case = self._any()
        if await self._open(connection, case, stream=False):
            json.loads(await connection.text())

    async def leave_early(self, connection: Connection) -> None:
        _, case = self._any()
        try:
            async with asyncio.timeout(self._random.random() * 0.3):
                await self._open(connection, case, stream=self._random.random() < 0.5)
        except TimeoutError:
            return

    async def malform(self, connection: Connection) -> None:
        _, case = self._any()
        body = self._random.choice(MALFORMED)
        status = await connection.open("POST", case.path, body)
        text = await connection.text()
        if not (400 <= status < 500 or (status == 200 and body.startswith(b'{"model'))):
            self._report.problem(f"{case.path} answered {body[:80]!r} with {status}: {text[:200]}")

    async def check(self, connection: Connection) -> None:
        started = time.monotonic()
        status = await connection.open("GET", "/health")
        self._report.health_seconds.append(time.monotonic() - started)
        if status != 200:
            self._report.problem(f"/health: {status}: {await connection.text()}")


# ---- the whole -----------------------------------------------------------------------------------


async def metrics(port: int) -> dict[str, float]:
    connection = Connection(port)
    await connection.open("GET", "/metrics")
    lines = (await connection.text()).splitlines()
    connection.close()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


async def alone(port: int) -> dict[int, tuple[str, str]]:
    """What every case brings when nothing else runs."""
    expected = {}
    for number, case in enumerate(cases()):
        connection = Connection(port)
        status = await connection.open("POST", case.path, case.encoded(stream=True))
        text = await connection.text()
        connection.close()
        expected[number] = said(case.path, text)
        if status != 200 or not expected[number][0] or expected[number][1].startswith("error"):
            raise SystemExit(f"{case.path} does not work: {status}: {text[:300]}")
    return expected


async def watch(process: psutil.Process, report: Report) -> None:
    while True:
        report.memory_bytes.append(process.memory_info().rss)
        await asyncio.sleep(1)


async def soak(port: int, process: psutil.Process, seconds: float, num_clients: int, seed: int) -> Report:
    report = Report()
    expected = await alone(port)
    started = time.monotonic()
    until = started + seconds
    watching = asyncio.create_task(watch(process, report))
    clients = [Client(port, expected, report, seed * 1000 + number) for number in range(num_clients)]
    await asyncio.gather(*(client.run(until) for client in clients))
    watching.cancel()
    report.seconds = time.monotonic() - started
    await _check_end(port, report)
    _check_memory(report)
    return report


async def _check_end(port: int, report: Report) -> None:
    deadline = time.monotonic() + 30
    while (found := await metrics(port))["stepflash_running_answers"] or found[
        "stepflash_engine_num_running"
    ]:
        if time.monotonic() > deadline:
            report.problem("answers still run when every client has left")
            return
        await asyncio.sleep(0.1)
    held = found["stepflash_engine_kv_used_bytes"] - found["stepflash_engine_kv_cached_bytes"]
    if held:
        report.problem(f"{held:g} bytes of the KV cache are held by nobody's request")
    if found.get("stepflash_engine_restarts", 0):
        report.problem("the engine had to be restarted")
    for name, count in found.items():
        status = name.partition('status="')[2][:3]
        if name.startswith("stepflash_requests_total") and status >= "500" and status != "529":
            report.problem(f"{count:g} x {name}")
        if name.startswith("stepflash_requests_total"):
            report.counts[f"status {status}"] += int(count)
    report.num_tokens = found['stepflash_tokens_total{kind="generated"}']


def _check_memory(report: Report) -> None:
    """Once caches and pools are warm, the process may not grow."""
    sizes = report.memory_bytes
    if len(sizes) < 10:
        return
    fifth = len(sizes) // 5
    before, after = statistics.median(sizes[fifth : 2 * fifth]), statistics.median(sizes[-fifth:])
    if after - before > max(GROWTH_BYTES, GROWTH_SHARE * before):
        report.problem(f"the memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description="many clients, well and badly behaved, for a long time")
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-open-answers", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    command = [sys.executable, "-m", "stepflash", "serve", args.model, "--port", "0", "--log-format", "off"]
    command += ["--kv-cache-gb", "0.1", "--max-open-answers", str(args.max_open_answers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stderr is not None
    try:
        port = int(server.stderr.readline().rsplit(":", 1)[1])
        process = psutil.Process(server.pid)
        report = asyncio.run(soak(port, process, args.seconds, args.clients, args.seed))
        server.terminate()
        if (status := server.wait(60)) != 0:
            report.problem(f"the server ended with status {status}")
    finally:
        server.kill()
        server.wait()
    if text := server.stderr.read().strip():
        report.problem(f"the server complained: {text[-2000:]}")
    server.stderr.close()
    if args.json:
        data = {name: getattr(report, name) for name in Report.__dataclass_fields__}
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    sizes = [size / 2**20 for size in report.memory_bytes] or [0.0]
    print(
        f"{report.seconds:.0f} s, {args.clients} clients, {report.num_tokens:.0f} tokens; "
        f"{', '.join(f'{name}: {count}' for name, count in sorted(report.counts.items()))}; "
        f"memory {sizes[len(sizes) // 5]:.0f} -> {sizes[-1]:.0f} MiB (most {max(sizes):.0f}); "
        f"health {max(report.health_seconds, default=0.0):.2f} s at most"
    )
    for problem in report.problems:
        print(f"did not hold: {problem}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
