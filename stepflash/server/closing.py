"""The end of the server's time: answers that still run are told so, each in the words of its API.

`Closing` knows who waits; `end` tells them all. Whoever comes later is told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from stepflash.errors import ServerClosing


class Closing:
    """Belongs to the event loop that serves; `end` is called there."""

    def __init__(self) -> None:
        self.is_over = False
        self._notices: set[asyncio.Future[None]] = set()

    def end(self) -> None:
        self.is_over = True
        for notice in self._notices:
            if not notice.done():
                notice.set_result(None)

    @contextlib.contextmanager
    def notice(self) -> Iterator[asyncio.Future[None]]:
        """A future that is done when the time is over."""
        notice: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.is_over:
            notice.set_result(None)
        self._notices.add(notice)
        try:
            yield notice
        finally:
            self._notices.discard(notice)

    def error(self) -> ServerClosing:
        return ServerClosing("the server is going down before this answer is complete; ask again")
