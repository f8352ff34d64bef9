"""The end of the server's time: answers that still run are told so, each in the words of its API.

`Closing` knows who waits; `end` tells them all. Whoever comes later is told at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from stepflash.errors import ServerClosing


class Closing:
    """Belongs to the event loop that serves; `end` is called there."""

    def __init__(self) -> None:
        self.is_over = False
        self._notices: set[Callable[[], None]] = set()

    def end(self) -> None:
        self.is_over = True
        for tell in tuple(self._notices):
            tell()

    @contextlib.contextmanager
    def notice(self, tell: Callable[[], None]) -> Iterator[None]:
        """While this lasts, `tell` is called when the time is over, at once if it is."""
        if self.is_over:
            tell()
        self._notices.add(tell)
        try:
            yield
        finally:
            self._notices.discard(tell)

    def error(self) -> ServerClosing:
        return ServerClosing("the server is going down before this answer is complete; ask again")
