"""What the server costs: tokens a second through HTTP streaming beside the same engine without a server.

    python benchmarks/server_overhead.py [MODEL] [--streams 16] [--tokens 256] [--rounds 5] [--json FILE]

Two processes with the same model and settings take turns, so that a machine that changes its mind changes it for
both: one drives the engine in process and throws the tokens away, the other is `stepflash serve`, whose streams a
client reads as bytes and counts at the end. The client runs on the same machine and takes its share of it. Every
stream has the same number of tokens, greedy; a figure is the median of the rounds after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from stepflash.engine.core import EngineCore
from stepflash.engine.llm import LLM
from stepflash.engine.request import Request, SamplingParams
from stepflash.errors import StepflashError
from stepflash.weights.hub import resolve_model

ROOT = Path(__file__).parent.parent
Process = subprocess.Popen[str]
PROMPTS = (
    "What is 17 * 23?",
    "Write the letters of the word window one by one.",
    "Sort these numbers: 9, 4, 7, 1.",
    "Which day comes three days after Monday?",
)


def prompt_of(index: int) -> str:
    return f"{PROMPTS[index % len(PROMPTS)]} ({index})"


# ---- the engine alone: a process that answers every line of its input with a line of seconds -----------------


def drive(core: EngineCore, requests: Sequence[Request]) -> float:
    """Seconds until every request has all its tokens."""
    started = time.perf_counter()
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
    return time.perf_counter() - started


def run_engine(model: str, dtype: str, streams: int, tokens: int, draft_depth: int | None) -> None:
    from stepflash.chat.messages import Conversation, Message

    llm = LLM(model, dtype=dtype, max_num_seqs=streams)
    assert llm.chat_template is not None
    assert llm.tokenizer is not None
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, draft_depth=draft_depth)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        requests = []
        for index in range(streams):
            conversation = Conversation(messages=(Message(role="user", content=prompt_of(index)),))
            rendered = llm.chat_template.render(conversation.messages)
            ids, cuts = llm.tokenizer.encode_with_cuts(rendered.text, rendered.cut_points)
            name = f"{number}-{index}"
            requests.append(
                Request(request_id=name, prompt_token_ids=tuple(ids), sampling=sampling, cut_points=cuts)
            )
        print(drive(llm.core, requests), flush=True)


# ---- the server, and a client that costs little ----------------------------------------------------------------


def request_bytes(prompt: str, tokens: int, draft_depth: int | None) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "draft_depth": draft_depth,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


def read_all(port: int, streams: int, tokens: int, draft_depth: int | None) -> tuple[float, int]:
    """Seconds until every stream has ended, and the number of `data:` frames. One epoll, nothing read twice: what the
    client takes from the machine is taken from the server."""
    sockets: dict[int, tuple[socket.socket, bytearray]] = {}
    ready = select.epoll()
    started = time.perf_counter()
    for index in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request_bytes(prompt_of(index), tokens, draft_depth))
        connection.setblocking(False)
        ready.register(connection.fileno(), select.EPOLLIN)
        sockets[connection.fileno()] = connection, bytearray()
    received = []
    while sockets:
        for number, _ in ready.poll():
            connection, data = sockets[number]
            piece = connection.recv(65536)
            data += piece
            if not piece:
                received.append(bytes(data))
                ready.unregister(number)
                connection.close()
                del sockets[number]
    seconds = time.perf_counter() - started
    ready.close()
    for data in received:
        if not data.startswith(b"HTTP/1.1 200"):
            raise StepflashError(data[:300].decode(errors="replace"))
    counts = [int(data.rpartition(b'"completion_tokens":')[2].partition(b",")[0]) for data in received]
    if counts != [tokens] * streams:
        raise StepflashError(f"the streams have {counts} tokens, each should have {tokens}")
    return seconds, sum(data.count(b"data: ") for data in received)


# ---- what the kernel says that they cost -----------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one process: seconds on a processor and times that it waited, of its first thread and of all others."""

    first_seconds: float
    other_seconds: float
    first_waits: int

    def __sub__(self, before: object) -> Cost:
        assert isinstance(before, Cost)
        return Cost(*(now - then for now, then in zip(self, before, strict=True)))


def cost_of(pid: int) -> Cost:
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        seconds[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
    waits = Path(f"/proc/{pid}/task/{pid}/status").read_text().partition("\nvoluntary_ctxt_switches:")[2]
    first = seconds.pop(pid)
    return Cost(first, sum(seconds.values()), int(waits.split()[0]))


def start(arguments: Sequence[str], **options: object) -> Process:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], text=True, env=environment, **options)  # type: ignore[call-overload,no-any-return]


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


class Round(NamedTuple):
    """One turn of each, over as many tokens."""

    tokens: int
    frames: int
    engine_seconds: float
    server_seconds: float
    engine: Cost
    server: Cost
    client: Cost


def run_round(
    engine: Process, server: Process, port: int, streams: int, tokens: int, draft_depth: int | None
) -> Round:
    before = cost_of(engine.pid)
    pipe(engine.stdin).write("\n")
    pipe(engine.stdin).flush()
    engine_seconds = float(pipe(engine.stdout).readline())
    of_engine = cost_of(engine.pid) - before
    before, client = cost_of(server.pid), cost_of(os.getpid())
    server_seconds, frames = read_all(port, streams, tokens, draft_depth)
    of_client, of_server = cost_of(os.getpid()) - client, cost_of(server.pid) - before
    return Round(streams * tokens, frames, engine_seconds, server_seconds, of_engine, of_server, of_client)


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(value(each) / each.tokens for each in rounds)

    rates = [1 / median(lambda each: each.engine_seconds), 1 / median(lambda each: each.server_seconds)]
    return {
        "seconds": [(each.engine_seconds, each.server_seconds) for each in rounds],
        "engine_tokens_per_second": rates[0],
        "server_tokens_per_second": rates[1],
        "overhead": 1 - rates[1] / rates[0],
        "cpu_us": {
            "engine alone": 1e6 * median(lambda each: each.engine.first_seconds + each.engine.other_seconds),
            "server's engine and kernels": 1e6 * median(lambda each: each.server.other_seconds),
            "server's event loop": 1e6 * median(lambda each: each.server.first_seconds),
            "client": 1e6 * median(lambda each: each.client.first_seconds + each.client.other_seconds),
        },
        "frames_per_token": median(lambda each: each.frames),
        "waits_per_token": median(lambda each: each.server.first_waits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="what the server costs over the engine")
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--draft-depth",
        choices=("0", "1", "2", "3", "adaptive"),
        default="0",
        help="the same for both; adaptive depths follow measured times and need not be the same (default: 0)",
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    resolve_model(args.model)
    draft_depth = None if args.draft_depth == "adaptive" else int(args.draft_depth)
    if args.engine:
        run_engine(args.model, args.dtype, args.streams, args.tokens, draft_depth)
        return
    options = [args.model, "--dtype", args.dtype]
    sizes = ["--streams", str(args.streams), "--tokens", str(args.tokens), "--draft-depth", args.draft_depth]
    engine = start([__file__, *options, *sizes, "--engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    serve = ["serve", *options, "--port", "0", "--max-num-seqs", str(args.streams), "--log-format", "off"]
    server = start(["-m", "stepflash", *serve], stderr=subprocess.PIPE)
    try:
        if pipe(engine.stdout).readline().strip() != "ready":
            raise StepflashError("the engine did not start")
        # A warning may come first, as that a quantised model has no receipt.
        line = next((line for line in pipe(server.stderr) if "serving" in line), None)
        if line is None:
            raise StepflashError("the server did not start")
        port = int(line.rsplit(":", 1)[1])
        sizes_of_round = args.streams, args.tokens, draft_depth
        rounds = [run_round(engine, server, port, *sizes_of_round) for _ in range(args.rounds + 1)]
    finally:
        for process in (engine, server):
            process.kill()
            process.wait()
    result = {"model": args.model, "streams": args.streams, "tokens": args.tokens, **summary(rounds[1:])}
    print(
        f"{args.model}, {args.streams} streams of {args.tokens} tokens, medians of {args.rounds}: engine "
        f"{result['engine_tokens_per_second']:.0f} tok/s, server {result['server_tokens_per_second']:.0f} tok/s, "
        f"overhead {100 * result['overhead']:.1f} %"
    )
    print(
        "microseconds of processor time a token: "
        + ", ".join(f"{k} {v:.1f}" for k, v in result["cpu_us"].items())
    )
    counts = result["frames_per_token"], result["waits_per_token"]
    print("frames a token {:.2f}, waits of the event loop a token {:.2f}".format(*counts))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
