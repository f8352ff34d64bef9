"""The engine thread and its asyncio face.

One thread owns the `EngineCore` and everything in it. Other threads put commands into its inbox; outputs go back
to the event loop that submitted the request, those of a step together (`Outbox`). Nothing else is shared. The thread
survives every exception: what cannot be attributed to a request ends those that were running, no more. Where even
that fails, or the thread itself is ended, another one takes over with a new core: requests that ran get an error,
those that come later do not notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from itertools import chain
from typing import TypeVar
from weakref import WeakValueDictionary

import torch

from stepflash.engine.core import EngineCore, EngineStats
from stepflash.engine.network import NativeNetwork
from stepflash.engine.outbox import Outbox, Stream
from stepflash.engine.request import CacheLookup, Output, Request
from stepflash.errors import EngineError

logger = logging.getLogger(__name__)
SMALL_PARAMETERS = 50_000_000
STATS_SECONDS = 0.01
IDLE_SECONDS = 5.0  # without work, before the prefix cache is saved
T = TypeVar("T")


class Engine:
    """Serves requests from any number of event loops. Close it when done; it is also a context manager."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, tuple[Outbox, Stream]] = {}
        # Each lives as long as a stream that it serves.
        self._outboxes: WeakValueDictionary[asyncio.AbstractEventLoop, Outbox] = WeakValueDictionary()
        self._stats = core.stats()
        self._stats_due = float("-inf")
        self._is_closed = False
        self._pid = os.getpid()
        self._num_threads = torch.get_num_threads()
        model = core.runner.model
        # Packed weights are buffers.
        self._num_parameters = sum(p.numel() for p in chain(model.parameters(), model.buffers()))
        self.num_restarts = 0
        self._thread = self._start(self._run)

    def submit(self, request: Request) -> AsyncIterator[Output]:
        """Check a request at once; it runs when the returned iterator is first awaited.

        Closing or cancelling the iterator before its last output aborts the request.

        Raises:
            RequestError: and its kinds, see `EngineCore.check`; the iterator may raise them too.
            EngineError: the engine is closed.
        """
        if self._is_closed:
            raise EngineError("the engine is closed")
        if os.getpid() != self._pid:
            raise EngineError("this engine runs in another process; make one in each process that needs one")
        self._core.check(request)
        return self._stream(request)

    def abort(self, request_id: str) -> None:
        """End a request at the top of the next step; nothing happens if it is not running."""
        self._inbox.put(lambda: self._abort(request_id))

    def stats(self) -> EngineStats:
        """As of the end of the last step or, where steps take less, of one in the last 10 milliseconds."""
        return self._stats

    def lookup(self, request: Request) -> CacheLookup | None:
        """What the prefix cache has of a request's prompt now; does not wait for the engine."""
        return self._core.lookup(request)

    def call(self, function: Callable[[EngineCore], T]) -> Future[T]:
        """Run a function on the engine thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._core))
            except BaseException as error:  # belongs to the caller, who gets it from the future
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

        self._inbox.put(run)
        return future

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Abort what runs, save the prefix cache if it has a path, end the thread. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._inbox.put(None)
        while (thread := self._thread).is_alive() and timeout_seconds > 0:
            started = time.monotonic()
            thread.join(timeout_seconds)
            timeout_seconds -= time.monotonic() - started

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @staticmethod
    def _start(target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name="stepflash-engine", daemon=True)
        thread.start()
        return thread

    async def _stream(self, request: Request) -> AsyncIterator[Output]:
        stream = Stream()
        outbox = self._outbox(asyncio.get_running_loop())
        self._inbox.put(lambda: self._add(request, outbox, stream))
        is_running = True
        try:
            while is_running:
                item = await stream.get()
                if isinstance(item, BaseException):
                    is_running = False
                    raise item
                is_running = item.finish_reason is None
                yield item
        finally:
            if is_running:
                self.abort(request.request_id)

    def _outbox(self, loop: asyncio.AbstractEventLoop) -> Outbox:
        outbox = self._outboxes.get(loop)
        if outbox is None:
            outbox = self._outboxes[loop] = Outbox(loop)
        return outbox

    # Everything below runs on the engine thread.

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # whatever ended this thread, another one goes on
            logger.critical("the engine thread ended; another one takes over", exc_info=error)
            self._end_streams(f"the engine was restarted ({type(error).__name__}: {error})")
            self._thread = self._start(self._restart)

    def _restart(self) -> None:
        self.num_restarts += 1
        try:
            self._core = self._core.rebuilt()
            self._stats = self._core.stats()
        except Exception as error:  # without a core there is nothing left that could serve
            logger.critical("the engine could not be restarted", exc_info=error)
            self._is_closed = True
            self._end_streams(f"the engine could not be restarted ({error})")
            return
        self._run()

    def _serve(self) -> None:
        while True:
            try:
                if not self._handle_inbox():
                    break
                if self._core.has_work:
                    self._choose_threads()
                    outputs = self._core.step()
                    now = time.monotonic()
                    # Whoever sees a last output must find it counted.
                    if now >= self._stats_due or any(output.finish_reason is not None for output in outputs):
                        self._stats = self._core.stats()
                        self._stats_due = now + STATS_SECONDS
                    self._send(outputs)
            except Exception as error:  # the thread must survive; see the module docstring
                logger.exception("the engine step failed")
                self._end_all(error)
                # Nobody can say what the failure left behind; a core that is not sound is replaced.
                self._core.check_integrity()
        self._end_all(EngineError("the engine was closed"))
        self._save()

    def _save(self) -> None:
        try:
            self._core.close()
        except OSError:
            logger.exception("the prefix cache could not be saved")

    def _forget(self, outbox: Outbox) -> None:
        """End the requests of a loop that is gone."""
        for name in [name for name, (own, _) in self._streams.items() if own is outbox]:
            del self._streams[name]
            self._core.abort(name)

    def _choose_threads(self) -> None:
        """Let a small model decode on one thread where torch runs its operations.

        They are too short to gain from a second thread, and they lose a great deal when that thread has to wait for
        its turn beside the event loop: 16 streams of nano on two cores came at a third of the engine's speed. A
        native network never waits for a thread that the system has put aside.
        """
        if self._num_parameters < SMALL_PARAMETERS and not isinstance(
            self._core.runner.network, NativeNetwork
        ):
            is_decoding = self._core.is_decoding
            torch.set_num_threads(1 if is_decoding else self._num_threads)

    def _end_all(self, error: BaseException) -> None:
        outputs = self._core.fail_all(error)
        self._stats = self._core.stats()
        self._send(outputs)

    def _end_streams(self, error: str) -> None:
        """End every request without asking the core, which cannot be trusted any more."""
        streams, self._streams = self._streams, {}
        for name, (outbox, stream) in streams.items():
            outbox.put([(stream, Output(request_id=name, finish_reason="error", error=error))])

    def _handle_inbox(self) -> bool:
        """Do what others asked for; waits while there is nothing else to do. False to end.

        A while without work is used to save what is left of the prefix cache.
        """
        while True:
            is_busy = self._core.has_work
            if is_busy and self._inbox.empty():
                return True
            is_saved = self._core.saver is None or not self._core.saver.has_news
            try:
                command = self._inbox.get(not is_busy, None if is_saved else IDLE_SECONDS)
            except queue.Empty:
                if is_busy:
                    return True
                self._save()
                continue
            if command is None:
                return False
            command()
            # Idle gauges must not be older than what happened to the last request.
            self._stats = self._core.stats()

    def _add(self, request: Request, outbox: Outbox, stream: Stream) -> None:
        if request.request_id in self._streams:
            outbox.put([(stream, EngineError(f"request id {request.request_id!r} is already running"))])
            return
        try:
            self._core.add(request)
        except Exception as refusal:
            outbox.put([(stream, refusal)])
            return
        self._streams[request.request_id] = outbox, stream

    def _abort(self, request_id: str) -> None:
        output = self._core.abort(request_id)
        if output is not None:
            self._stats = self._core.stats()
            self._send([output])

    def _send(self, outputs: list[Output]) -> None:
        batches: dict[Outbox, list[tuple[Stream, Output | BaseException]]] = {}
        for output in outputs:
            if output.request_id not in self._streams:
                continue
            outbox, stream = self._streams[output.request_id]
            if output.finish_reason is not None:
                del self._streams[output.request_id]
            batches.setdefault(outbox, []).append((stream, output))
        for outbox, batch in batches.items():
            if not outbox.put(batch):
                self._forget(outbox)
