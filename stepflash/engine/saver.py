"""Saves what the prefix cache gains while the engine works, so that a process that is killed loses seconds of it.

Between two steps a few rows are copied, never for more than a small share of the time; a thread of its own hashes
and writes them. Only one link (see `disk`) is written at a time and one is filled meanwhile: where the disk does not
keep up nothing more is copied, and what the cache evicts before its turn is not saved. Nothing here ever fails a
request. A link is appended to the file; a file that has grown too large is written anew beside it and moved there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from stepflash.engine import disk
from stepflash.engine.disk import Link, Origin, Position
from stepflash.engine.kv_cache import FULL, SLIDING, KVCache
from stepflash.engine.prefix import Node, PrefixCache, Snapshot

logger = logging.getLogger(__name__)
COPY_SHARE = 0.01  # of the time, for copying rows between steps
COPY_BYTES = 1 << 20  # at a time, in whole blocks
SAVE_SECONDS = 5.0  # at most, from the first row of a link to writing it
LINK_BYTES = 64 << 20
MAX_LINKS = 1024
REWRITTEN_SHARE = 0.75  # of the limit, by a file written anew; the rest is room for more
RETRY_SECONDS = 60.0  # after a failure


class Saver:
    """The file of one prefix cache. Every method is called from the thread that runs the steps.

    Raises:
        ConfigError: there is a file of something else, or nothing can be written.
    """

    def __init__(
        self, path: Path, cache: KVCache, prefix: PrefixCache, source: Origin, max_bytes: int
    ) -> None:
        self._path, self._cache, self._prefix = path, cache, prefix
        self._source, self._max_bytes = source, max_bytes
        self._pid = os.getpid()
        self._stores: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
        for name, tensor, group in disk.stores(cache):
            self._stores[group].append((name, tensor))
        self._waiting: dict[Node, None] = {}
        self._now: tuple[Node, Snapshot, list[Node], list[Node]] | None = None
        self._link = self._new_link()
        self._position = Position()
        self._recent: list[int] = []  # as the last link tells it
        self._thread: threading.Thread | None = None
        self._outcome: tuple[str, int] | Exception | None = None
        self._not_before = 0.0
        # A file that is written anew: its name until it is complete, and how many snapshots it still waits for.
        self._partial: Path | None = path.with_name(f"{path.name}.{self._pid}.partial")
        self._num_missing = 0
        self._identity = (0, 0, 0)
        self._is_shared = False  # another process writes the same file
        disk.check_writable(path)
        if path.exists():
            try:
                self._position = disk.load(path, cache, prefix, source)
                self._partial, self._identity = None, _identity(path)
            except disk.DamagedCache as error:
                aside = disk.put_aside(path)
                logger.warning(
                    "%s: damaged prefix cache (%s); it is %s now, and the cache starts empty",
                    path,
                    error,
                    aside.name,
                )
        prefix.added = self._note

    @property
    def has_news(self) -> bool:
        """Whether `flush` would write anything but the order of use."""
        return bool(self._waiting or self._link.num_bytes)

    def turn(self) -> None:
        """Go on a little. Costs next to nothing when it is not yet time, or nothing is to do."""
        if not self.has_news and self._thread is None:
            return
        start = time.perf_counter()
        if start < self._not_before or self._is_shared or os.getpid() != self._pid:
            return
        try:
            self._turn(start)
        except BaseException as error:
            # Rows may be entered and not copied: nothing of this file is continued.
            self._start_anew(isinstance(error, _OtherWriterError))
            self._not_before = time.perf_counter() + RETRY_SECONDS
            if not isinstance(error, Exception):  # Ctrl-C is nothing to be silent about
                raise
            logger.exception("the prefix cache could not be saved")
            return
        end = time.perf_counter()
        self._not_before = end + (end - start) / COPY_SHARE

    def flush(self) -> None:
        """Save all that is not saved yet, without pauses, and see it written.

        Raises:
            OSError: it cannot be written.
        """
        if os.getpid() != self._pid:
            return
        try:
            self._settle()
        except OSError:
            logger.warning("an earlier part of the prefix cache was not saved; all of it is written anew")
            self._start_anew()
        if self._is_shared or (self._partial is None and not self._is_ours()):
            self._start_anew()
        self._is_shared = False
        try:
            while self.has_news or self._partial is not None or self._recent != self._order():
                self._copy(LINK_BYTES)
                if not self._waiting or self._is_full():
                    self._write()
                    self._settle()
        except BaseException:
            self._start_anew()
            raise

    def settle(self) -> None:
        """Wait for what is being written, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()

    def _note(self, node: Node) -> None:
        """The prefix cache has a new snapshot."""
        self._waiting[node] = None
        if len(self._waiting) > 2 * self._prefix.num_snapshots + 64:  # most of them were evicted meanwhile
            self._waiting = {node: None for node in self._waiting if node.snapshot is not None}
            self._num_missing = min(self._num_missing, len(self._waiting))

    def _turn(self, now: float) -> None:
        is_due = self._is_full() or (self._link.num_bytes and now - self._link.started >= SAVE_SECONDS)
        if not is_due and self._waiting:
            self._copy(COPY_BYTES)
        if self._thread is None or not self._thread.is_alive():
            self._settle()
            if is_due:
                self._write()

    def _is_full(self) -> bool:
        return self._link.num_bytes >= min(LINK_BYTES, max(1, self._max_bytes // 8))

    def _new_link(self) -> Link:
        """An empty one."""
        empty = {name: [tensor[:0].cpu()] for group in self._stores for name, tensor in group}
        return Link(rows=empty, started=time.perf_counter())

    def _copy(self, max_bytes: int) -> None:
        """Copy rows of what waits, about `max_bytes`, and enter the snapshots that are complete by it."""
        while max_bytes > 0 and not self._is_full() and (now := self._next()) is not None:
            node, snapshot, full, windows = now
            max_bytes -= self._copy_rows(FULL, full, max_bytes)
            if not full and max_bytes > 0:
                max_bytes -= self._copy_rows(SLIDING, windows, max_bytes)
            if not full and not windows:
                self._enter(node, snapshot)

    def _next(self) -> tuple[Node, Snapshot, list[Node], list[Node]] | None:
        """The snapshot in turn, and the nodes whose full and whose sliding blocks are to be copied for it."""
        if self._now is not None and self._now[0].snapshot is self._now[1]:
            return self._now
        self._now = None
        while self._waiting:
            node = next(iter(self._waiting))
            snapshot = node.snapshot
            if snapshot is None or node in self._position.snapshots:  # evicted, or there from an earlier time
                self._drop(node)
                continue
            full: list[Node] = []
            ancestor = node
            while ancestor.parent is not None and ancestor not in self._position.nodes:
                full.append(ancestor)
                ancestor = ancestor.parent
            windows = [n for n in disk.window_nodes(node, snapshot.first) if n not in self._position.windows]
            self._now = node, snapshot, full[::-1], windows if snapshot.block_ids else []
            return self._now
        return None

    def _drop(self, node: Node) -> None:
        del self._waiting[node]
        self._num_missing -= 1

    def _copy_rows(self, group: int, nodes: list[Node], max_bytes: int) -> int:
        """Copy the blocks of the first of these nodes, and take them off the list; the bytes copied."""
        size = self._cache.block_bytes[group]
        taken = nodes[: max(1, max_bytes // max(1, size))]
        if not taken:
            return 0
        del nodes[: len(taken)]
        position, link = self._position, self._link
        if group == FULL:
            ids = [node.block_id for node in taken]
            for node in taken:
                assert node.parent is not None
                link.parents.append(position.nodes.get(node.parent, -1))
                link.token_ids.append(node.token_ids)
                position.nodes[node] = position.num_nodes
                position.num_nodes += 1
        else:
            assert self._now is not None
            snapshot = self._now[1]
            ids = [snapshot.block_ids[node.depth - 1 - snapshot.first] for node in taken]
            for node in taken:
                position.windows[node] = position.num_windows
                position.num_windows += 1
                link.num_windows += 1
        if not link.num_bytes:
            link.started = time.perf_counter()
        index = torch.tensor(ids, device=self._cache.device)
        for name, tensor in self._stores[group]:
            link.rows[name].append(tensor[index].cpu())
        link.num_bytes += len(taken) * size
        return len(taken) * size

    def _enter(self, node: Node, snapshot: Snapshot) -> None:
        """All rows of a snapshot are in this link or one before it."""
        position, link = self._position, self._link
        windows = disk.window_nodes(node, snapshot.first) if snapshot.block_ids else []
        entry = position.nodes[node], snapshot.first, [position.windows[n] for n in windows]
        link.snapshots.append(entry)
        link.carries.append(tuple(carry.cpu() for carry in snapshot.carries))
        link.num_bytes += sum(carry.nbytes for carry in snapshot.carries)
        position.snapshots[node] = position.num_snapshots
        position.num_snapshots += 1
        self._now = None
        self._drop(node)

    def _order(self) -> list[int]:
        known = self._position.snapshots
        return [known[node] for node in self._prefix.snapshots() if node in known]

    def _write(self) -> None:
        """Give the link to a thread that writes it. Nothing else is being written."""
        position = self._position
        is_too_long = position.num_bytes + self._link.num_bytes > self._max_bytes
        if self._partial is None and (is_too_long or position.num_links >= MAX_LINKS):
            self._start_anew()
            return
        link, self._link = self._link, self._new_link()
        self._recent = link.recent = self._order()
        # The first file need not be complete to be better than none.
        is_complete = self._num_missing <= 0 or not self._path.exists()
        arguments = link, position.num_bytes, position.last, is_complete
        self._thread = threading.Thread(target=self._append, args=arguments, name="stepflash-saver")
        self._thread.start()

    def _append(self, link: Link, offset: int, previous: str, is_complete: bool) -> None:
        """Runs on a thread of its own."""
        try:
            if self._partial is None and not self._is_ours():
                raise _OtherWriterError(f"{self._path} was written by another process")
            with open(self._partial or self._path, "r+b" if offset else "w+b") as file:
                file.seek(offset)
                file.truncate()
                try:
                    self._outcome = disk.append(file, link, self._source, previous)
                except BaseException:
                    file.truncate(offset)
                    raise
            if self._partial is not None and is_complete:
                os.replace(self._partial, self._path)
                self._partial = None
            if self._partial is None:
                self._identity = _identity(self._path)
        except Exception as error:  # raised by `_settle`
            self._outcome = error

    def _settle(self) -> None:
        """Take over what came of the last link.

        Raises:
            OSError: it was not written.
        """
        self.settle()
        self._thread, outcome, self._outcome = None, self._outcome, None
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            self._position.last, self._position.num_bytes = outcome
            self._position.num_links += 1

    def _start_anew(self, is_shared: bool = False) -> None:
        """Write a new file, of the most recently used prefixes in memory, beside the old one."""
        self.settle()
        self._thread = self._outcome = self._now = None
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
        self._partial = self._path.with_name(f"{self._path.name}.{self._pid}.partial")
        self._position, self._link, self._recent = Position(), self._new_link(), []
        self._waiting = dict.fromkeys(self._most_recent(int(self._max_bytes * REWRITTEN_SHARE)))
        self._num_missing = len(self._waiting)
        self._is_shared = is_shared

    def _most_recent(self, max_bytes: int) -> list[Node]:
        """The nodes of the snapshots that fit, least recently used first."""
        full, sliding = self._cache.block_bytes
        seen: tuple[set[Node], set[Node]] = set(), set()
        chosen = []
        for node in reversed(self._prefix.snapshots()):
            assert node.snapshot is not None
            path = []
            ancestor = node
            while ancestor.parent is not None and ancestor not in seen[FULL]:
                path.append(ancestor)
                ancestor = ancestor.parent
            windows = set(disk.window_nodes(node, node.snapshot.first)) - seen[SLIDING]
            if (cost := len(path) * full + len(windows) * sliding) <= max_bytes:
                max_bytes -= cost
                seen[FULL].update(path)
                seen[SLIDING].update(windows)
                chosen.append(node)
        return chosen[::-1]

    def _is_ours(self) -> bool:
        """Whether the file is as this process left it."""
        try:
            return _identity(self._path) == self._identity
        except FileNotFoundError:
            return False


class _OtherWriterError(OSError):
    """The file is not as this process left it; it keeps its own for the end."""


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size
