"""What captured passes share: their sizes, the buffers that the host fills for them, capture and replay.

A CUDA graph does again exactly what was done once: the same kernels, sizes and addresses. So everything that changes
from pass to pass is read from buffers that never move.
"""

from __future__ import annotations

import logging
import warnings
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence

import torch

from stepflash.engine.kv_cache import KVCache, SequenceBlocks

logger = logging.getLogger(__name__)

# Of passes, in tokens; others are filled up.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MOST = SIZES[-1]
# Narrower tables would save nothing.
LEAST_WIDTH = 64
# Each takes some memory; beyond so many the one that was not used for longest goes.
MOST_GRAPHS = 256

# Takes a function of no arguments, and whether it is the first of its kind; returns one that does again what that
# did to its tensors.
Capture = Callable[[Callable[[], None], bool], Callable[[], None]]


def size_for(num_tokens: int) -> int:
    return SIZES[bisect_left(SIZES, num_tokens)]


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


class Staged:
    """int32 words that the host writes, and their copy on the device."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.host = torch.zeros(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.device = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Before the host writes again: what it sent last must be there."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, num_words: int) -> None:
        self.device[:num_words].copy_(self.host[:num_words], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Tables:
    """The block tables of the sequences in a pass: [MOST, 2, width] int32, full and sliding side by side.

    Widths are powers of two, so that kernels which ask for it do not search a short context like a long one.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._num_columns = round_up(cache.tables[0].shape[1], 8)  # rows begin at multiples of 64 bytes
        self._staged = Staged(MOST * 2 * self._num_columns, cache.device)
        # What is there: the width, which sequences with how many blocks, and the number of rows.
        self._held: tuple[int, list[tuple[SequenceBlocks, int, int]], int] = 0, [], 0

    def send(self, sequences: Sequence[SequenceBlocks], num_rows: int, num_slots: int) -> int:
        """The tables of these sequences, then the first one's again up to `num_rows`; returns their width."""
        num_blocks = -(-num_slots // self._cache.block_size)
        width = min(max(LEAST_WIDTH, 1 << (num_blocks - 1).bit_length()), self._num_columns)
        held = [
            (blocks, len(blocks.full), blocks.sliding_first + len(blocks.sliding)) for blocks in sequences
        ]
        if self._held[:2] == (width, held) and self._held[2] >= num_rows:
            return width
        num_words = num_rows * 2 * width
        self._staged.wait()
        tables = self._staged.host[:num_words].view(num_rows, 2, width).numpy()
        rows = [blocks.row for blocks in sequences]
        rows += rows[:1] * (num_rows - len(rows))
        # All blocks that they have: later passes over the same sequences may reach further.
        reach = min(width, max(max(entry[1:]) for entry in held))
        for group, table in enumerate(self._cache.tables):
            tables[:, group, :reach] = table[rows, :reach]
        self._staged.send(num_words)
        self._held = width, held, num_rows
        return width

    def views(self, num_seqs: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_seqs, width] int32 of both groups, on the device."""
        tables = self._staged.device[: MOST * 2 * width].view(MOST, 2, width)[:num_seqs]
        return tables[:, 0], tables[:, 1]


class Graphs:
    """Functions over buffers, by key: captured at first use, then replayed. A key begins with its kind.

    `replays`: None where there was not enough memory. `num_captured`: since the start.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.replays: dict[tuple[Hashable, ...], Callable[[], None] | None] = {}
        self.num_captured = 0
        self.is_off = False

    def run(self, key: tuple[Hashable, ...], compute: Callable[[], None]) -> bool:
        """False, and nothing done that matters, if this cannot be captured."""
        if key in self.replays:
            replay = self.replays.pop(key)  # put at the end again
        else:
            replay = self._captured(key, compute)
            if len(self.replays) >= MOST_GRAPHS:
                del self.replays[next(iter(self.replays))]
        self.replays[key] = replay
        if replay is None:
            return False
        replay()
        return True

    def _captured(self, key: tuple[Hashable, ...], compute: Callable[[], None]) -> Callable[[], None] | None:
        self.num_captured += 1
        try:
            return self._capture(compute, all(other[0] != key[0] for other in self.replays))
        except torch.OutOfMemoryError:
            logger.warning("not enough memory for a CUDA graph, some passes will be slower: %s", key)
        except Exception:
            self.is_off = True
            logger.warning(
                "CUDA graphs are off, decoding will be slower: a pass could not be captured", exc_info=True
            )
        return None


def cuda_capture(device: torch.device) -> Capture:
    """Captures on one stream into one pool of memory: replays follow one another and leave nothing in it."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], None], is_first: bool) -> Callable[[], None]:
        caller = torch.cuda.current_stream(device)
        # NOTE: a capture that fails leaves its stream current; this context puts the caller's back.
        with torch.cuda.stream(stream):
            stream.wait_stream(caller)
            run()  # compiles kernels and makes what libraries keep; what it writes is written again
            if is_first:
                _run_without_waiting(run)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                run()
        caller.wait_stream(stream)
        return graph.replay

    return capture


def _run_without_waiting(run: Callable[[], None]) -> None:
    """Raises where `run` waits for the device: a capture that fails there would leave the allocator in disorder.

    This holds for all threads meanwhile, so it is not done without need.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
