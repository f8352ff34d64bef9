"""Runs the application: one process, one port, an orderly end.

The first SIGTERM or SIGINT stops accepting and lets running answers finish, for at most `drain_seconds`; then those
that still run end with an error in the words of their API. The second signal ends at once. Both are a success: the
exit status is 0.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from stepflash.errors import ConfigError
from stepflash.server.closing import Closing
from stepflash.server.connections import connection_class, raise_file_limit
from stepflash.settings import ServerSettings

LAST_WORDS_SECONDS = 3  # for the errors to reach clients that read, before connections are cut


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, closing: Closing, drain_seconds: int) -> None:
        super().__init__(config)
        self._closing = closing
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain_seconds, self._closing.end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn's, this does not note the signal to raise it again afterwards.
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def listen(settings: ServerSettings) -> socket.socket:
    """Take the port; done before the model is loaded, so that a mistake shows at once.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another --port or --host"
        ) from None


def run_server(app: FastAPI, listener: socket.socket, settings: ServerSettings, model_name: str) -> int:
    """Serve what `create_app` made until a signal comes."""
    host, port = listener.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app,
        http=connection_class(raise_file_limit()),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds + LAST_WORDS_SECONDS,
    )
    print(f"stepflash: serving {model_name} at http://{shown_host}:{port}", file=sys.stderr, flush=True)
    if not settings.api_keys and host not in ("127.0.0.1", "::1"):
        print(
            "stepflash: warning: anyone who reaches this address can use it; see --api-key", file=sys.stderr
        )
    # What is there now stays: a collection that looks through it holds up every stream.
    gc.collect()
    gc.freeze()
    try:
        _Server(config, app.state.closing, settings.drain_seconds).run(sockets=[listener])
    finally:
        gc.unfreeze()
    return 0
