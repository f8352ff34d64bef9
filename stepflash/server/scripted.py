"""`python -m stepflash.server.scripted`: the server with a scripted model, for checks of client programs."""

from __future__ import annotations

import argparse
import sys

from stepflash.assistant.scripted import scripted_session
from stepflash.assistant.scripted_agent import scripted_agent
from stepflash.server.app import create_app
from stepflash.server.run import listen, run_server
from stepflash.settings import ServerSettings

NAME = "scripted"
CONTEXT_TOKENS = 400_000  # of bytes: a tokenizer without merges needs four times as many


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m stepflash.server.scripted", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port, 0 for any (%(default)s)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before every five tokens")
    options = parser.parse_args(arguments)
    session = scripted_session(
        answer=scripted_agent, bursts=(5,), pause=options.pause, max_context_tokens=CONTEXT_TOKENS
    )
    settings = ServerSettings(port=options.port)
    with listen(settings) as listener:
        return run_server(create_app(session, NAME, settings=settings), listener, settings, NAME)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
