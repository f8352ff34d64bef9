"""An application behind a real port on loopback, for clients that cannot call it in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from stepflash.server.run import listen
from stepflash.settings import ServerSettings


@contextlib.contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """The address of an application that is served until the block ends; `options` are uvicorn's."""
    with listen(ServerSettings(port=0)) as listener:
        options = {"log_level": "warning", "timeout_graceful_shutdown": 1, **options}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in 30 seconds"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
