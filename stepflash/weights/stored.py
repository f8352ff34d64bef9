"""Tensors where they lie: a file region, how to turn it into numbers, and bounded reads.

A `StoredTensor` is one parameter as a checkpoint holds it, whatever the format. Nothing is read before its values
are asked for, and then in pieces of a few MiB, so that loading never needs much more memory than the result.
`view` is the same bytes mapped into memory, without a copy.
"""

import math
import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.kernels.formats import Format

CHUNK_BYTES = 8 << 20
EXPANDED_CHUNK_BYTES = 1 << 20  # for formats that are decoded through several float32 temporaries


@dataclass(frozen=True, slots=True)
class PackedStorage:
    """A tensor that the kernels can read as it is stored: its format, and its packed bytes in order (uint8)."""

    fmt: Format
    pieces: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One parameter in a checkpoint.

    Attributes:
        name: the released name.
        shape: row-major.
        dtype_name: the format's own word: "BF16", "F8_E4M3", "Q4_K".
        num_bytes: in the file, scales included.
        origin: file and name in the file, for messages.
        values: reads the decoded values in order, as tensors of some float dtype with a few Mi elements.
            NOTE: a piece is only valid until the next one is asked for.
        scales: reads the block scales of an FP8 tensor, float32.
        view: the stored bytes as a tensor (copy on write), when they are a plain float dtype; else None.
        packed: the same values in a format of the kernels, when nothing is lost by it.
    """

    name: str
    shape: tuple[int, ...]
    dtype_name: str
    num_bytes: int
    origin: str
    values: Callable[[], Iterator[Tensor]]
    scales: Callable[[], Tensor] | None = None
    view: Callable[[], Tensor] | None = None
    view_dtype: torch.dtype | None = None
    packed: PackedStorage | None = None

    def fill(self, out: Tensor) -> None:
        """Write all values into `out`: contiguous, on the CPU, of this shape and any float dtype."""
        flat = out.view(-1)
        done = 0
        for piece in self.values():
            flat[done : done + piece.numel()].copy_(piece.view(-1))
            done += piece.numel()
        assert done == flat.numel()


class TensorFile:
    """A file of tensors: reads in chunks, or maps itself once for views."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def chunks(
        self, offset: int, num_bytes: int, unit_bytes: int, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Tensor]:
        """The region as uint8 tensors of whole units, about `chunk_bytes` each.

        NOTE: each chunk reuses the same memory and is only valid until the next one.
        """
        buffer = bytearray(min(max(chunk_bytes // unit_bytes, 1) * unit_bytes, num_bytes))
        if not buffer:
            return
        whole = torch.frombuffer(buffer, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                remaining = num_bytes
                while remaining:
                    size = min(remaining, len(buffer))
                    self._read_exactly(file.readinto, memoryview(buffer)[:size])
                    yield whole[:size]
                    remaining -= size
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot read: {error.strerror or error}") from error

    def _read_exactly(self, readinto: Callable[[memoryview], int | None], target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = readinto(target[done:])
            if not count:
                raise WeightsError(f"{self.path}: truncated while it was being read")
            done += count

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The region as a tensor over the mapped file.

        The map is private: writing to the tensor (training does) copies the touched pages and never changes
        the file. The file must not be truncated or rewritten in place while the tensor lives.
        """
        with self._lock:
            if self._map is None:
                try:
                    with self.path.open("rb") as file:
                        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                except OSError as error:
                    raise WeightsError(f"{self.path}: cannot map: {error.strerror or error}") from error
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def plain_values(file: TensorFile, offset: int, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values of a region of `count` plain floats."""
    for chunk in file.chunks(offset, count * dtype.itemsize, dtype.itemsize):
        yield chunk.view(dtype)


def small_pieces(stored: StoredTensor, limit: int = 1 << 19) -> Iterator[Tensor]:
    """The values in flat pieces of at most `limit` elements, checked: for code that needs several copies of each.

    Raises:
        WeightsError: a value is NaN or infinite.
    """
    for piece in stored.values():
        flat = piece.reshape(-1)
        for start in range(0, flat.numel(), limit):
            part = flat[start : start + limit]
            if not bool(part.isfinite().all()):
                raise WeightsError(f"{stored.origin}: has NaN or infinite values; it cannot be converted")
            yield part


def shortened(items: list[str], limit: int = 5) -> str:
    """`a, b, c and 12 more`: lists in messages stay on one readable line."""
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
