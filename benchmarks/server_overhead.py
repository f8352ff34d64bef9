"""What the server costs: tokens a second through HTTP streaming beside the same engine without a server.

    python benchmarks/server_overhead.py [MODEL] [--streams 16] [--tokens 256] [--rounds 5] [--json FILE]

Two processes with the same model and settings take turns, so that a machine that changes its mind changes it for
both: one drives the engine in process and throws the tokens away, the other is `stepflash serve`, whose streams a
client reads as bytes and counts at the end. The client runs on the same machine and takes its share of it. Every
stream has the same number of tokens, greedy; a figure is the median of the rounds after one that does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from stepflash.engine.core import EngineCore
from stepflash.engine.llm import LLM
from stepflash.engine.request import Request, SamplingParams
from stepflash.errors import StepflashError
from stepflash.weights.hub import resolve_model

ROOT = Path(__file__).parent.parent
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


def run_engine(model: str, dtype: str, streams: int, tokens: int) -> None:
    from stepflash.chat.messages import Conversation, Message

    llm = LLM(model, dtype=dtype, max_num_seqs=streams)
    assert llm.chat_template is not None
    assert llm.tokenizer is not None
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
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


async def read_stream(port: int, body: bytes) -> int:
    """Tokens of one streamed answer, as its usage counts them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
    writer.write(f"{head}connection: close\r\n\r\n".encode() + body)
    received = await reader.read(-1)
    writer.close()
    if not received.startswith(b"HTTP/1.1 200"):
        raise StepflashError(received[:300].decode(errors="replace"))
    usage = received[received.rindex(b'"usage":') :]
    return int(usage.split(b'"completion_tokens":')[1].split(b",")[0])


async def read_all(port: int, streams: int, tokens: int) -> float:
    bodies = [
        json.dumps(
            {
                "messages": [{"role": "user", "content": prompt_of(index)}],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for index in range(streams)
    ]
    started = time.perf_counter()
    counts = await asyncio.gather(*(read_stream(port, body) for body in bodies))
    seconds = time.perf_counter() - started
    if counts != [tokens] * streams:
        raise StepflashError(f"the streams have {counts} tokens, each should have {tokens}")
    return seconds


def start(arguments: Sequence[str], **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], text=True, env=environment, **options)  # type: ignore[call-overload,no-any-return]


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def main() -> None:
    parser = argparse.ArgumentParser(description="what the server costs over the engine")
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    resolve_model(args.model)
    if args.engine:
        run_engine(args.model, args.dtype, args.streams, args.tokens)
        return
    options = [args.model, "--dtype", args.dtype]
    sizes = ["--streams", str(args.streams), "--tokens", str(args.tokens)]
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
        seconds: dict[str, list[float]] = {"engine": [], "server": []}
        for _ in range(args.rounds + 1):
            pipe(engine.stdin).write("\n")
            pipe(engine.stdin).flush()
            seconds["engine"].append(float(pipe(engine.stdout).readline()))
            seconds["server"].append(asyncio.run(read_all(port, args.streams, args.tokens)))
    finally:
        for process in (engine, server):
            process.kill()
            process.wait()
    total = args.streams * args.tokens
    rates = {name: total / statistics.median(times[1:]) for name, times in seconds.items()}
    overhead = 1 - rates["server"] / rates["engine"]
    result = {"model": args.model, "streams": args.streams, "tokens": args.tokens, "seconds": seconds}
    result |= {"tokens_per_second": rates, "overhead": overhead}
    print(
        f"{args.model}, {args.streams} streams of {args.tokens} tokens: engine {rates['engine']:.0f} tok/s, "
        f"server {rates['server']:.0f} tok/s, overhead {100 * overhead:.1f} %"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
