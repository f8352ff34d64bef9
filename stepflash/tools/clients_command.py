"""`stepflash clients NAME`: prints the configuration of a coding agent, or tests the agent with it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from stepflash.errors import ConfigError
from stepflash.tools.client_check import PROGRAMS, check, find_program, scripted_server
from stepflash.tools.connect import CLIENTS, NO_KEY, find_target

DEFAULT_URL = "http://127.0.0.1:8000"
MIN_CONTEXT_TOKENS = 32_768  # below, an agent's first prompt leaves no room for work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepflash clients`."""
    parser.add_argument("client", choices=CLIENTS, metavar="CLIENT", help=f"one of {', '.join(CLIENTS)}")
    parser.add_argument("--base-url", metavar="URL", help=f"of the server ({DEFAULT_URL})")
    parser.add_argument("--api-key", default=NO_KEY, metavar="KEY", help="the key to use, if it has any")
    parser.add_argument("--model", metavar="NAME", help="the served name; default: ask the server")
    parser.add_argument("--context", type=int, metavar="N", help="its context in tokens; default: ask")
    parser.add_argument(
        "--test",
        action="store_true",
        help="run the client through a small task with files, in a folder and a home of its own; against the server "
        "at --base-url, or else one with a scripted model that is started for it",
    )


def run(options: argparse.Namespace) -> int:
    """Print the configuration, or test it."""
    if options.test:
        return _test(options)
    base_url = options.base_url or DEFAULT_URL
    target = find_target(base_url, options.api_key, options.model, options.context)
    print(CLIENTS[options.client](target))
    if target.context_tokens < MIN_CONTEXT_TOKENS:
        print(
            f"stepflash: warning: agents need about {MIN_CONTEXT_TOKENS} tokens of context, "
            f"and {target.model} has {target.context_tokens}",
            file=sys.stderr,
        )
    return 0


def _test(options: argparse.Namespace) -> int:
    """Run the client through the task.

    Raises:
        ConfigError: the client or the server is not there.
        ClientFailed: the client did not do the task.
    """
    if find_program(options.client) is None:
        program = PROGRAMS[options.client]
        raise ConfigError(
            f"{program.program} is not installed: npm install {program.package}, or make test-clients for all of them"
        )
    with contextlib.ExitStack() as stack:
        if options.base_url is None:
            print("a server with a scripted model is started for this; --base-url tests one of yours")
            target = find_target(stack.enter_context(scripted_server()), options.api_key, None, None)
        else:
            target = find_target(options.base_url, options.api_key, options.model, options.context)
        print(f"{options.client} works on a task with {target.model} at {target.base_url} ...", flush=True)
        checked = check(options.client, target)
    print(f"done in {checked.seconds:.1f} s by {checked.version}: {' '.join(checked.answer.split())}")
    for line in _reuse_lines(checked.requests, has_cache=options.base_url is not None):
        print(line)
    return 0


def _reuse_lines(requests: list[dict[str, Any]] | None, has_cache: bool) -> Iterator[str]:
    """How much of each prompt was new to the server; a scripted model has no cache to tell of."""
    for number, request in enumerate(requests or (), 1):
        line = f"request {number}: {request['prompt_tokens']} tokens"
        if request["nearest"] is not None:
            line += f", {request['nearest']['shared_tokens']} as in an earlier request and its answer"
        yield line + (f", {request['cached_tokens']} from the cache" if has_cache else "")
