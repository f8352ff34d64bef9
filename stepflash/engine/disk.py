"""The prefix cache on disk, so that conversations survive a restart: what a file holds, and how it is read.

A file is a chain of safetensors, one behind the other. Each link adds blocks, windows and snapshots to those of the
links before it, names the checksum of the last one, and ends with the SHA-256 of all its own bytes. Its metadata has
a digest of the network that computed them. A file of another model, configuration or cache layout, or with a single
byte changed, is never reinterpreted: the first is refused, the second put aside. A link that was not written to its
end, because the process was killed meanwhile, is not there. `saver` writes the links.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stepflash.engine.kv_cache import FULL, SLIDING, KVCache
from stepflash.engine.prefix import Node, PrefixCache
from stepflash.errors import ConfigError
from stepflash.model.transformer import Step3p5ForCausalLM

logger = logging.getLogger(__name__)
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int32: "I32",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_VERSION = "4"
_CHECKSUM = "sha256"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_READ_BYTES = 4 << 20
_MAX_HEADER_BYTES = 1 << 30
# Values of each parameter that enter the digest: enough to tell two trainings apart, few enough to be instant.
_NUM_SAMPLES = 64


class DamagedCache(Exception):
    """What stands in a file cannot have been written like that. Says what is wrong."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What computed the keys and values: a digest, and those of its parts that a user knows."""

    digest: str
    told: dict[str, str]


def origin(model: Step3p5ForCausalLM, cache: KVCache) -> Origin:
    """Covers configuration, weights (sampled), cache layout and dtype."""
    layout = [tuple(layer.keys.shape[1:]) for layer in cache.layers.values()]
    digest = hashlib.sha256(f"{_VERSION} {model.config} {layout} {cache.limits.dtype}".encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        step = max(1, flat.shape[0] // _NUM_SAMPLES)
        sample = flat[::step].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    told = {
        "format": _VERSION,
        "kv_dtype": str(cache.limits.dtype).removeprefix("torch."),
        "block_size": str(cache.block_size),
        "prediction modules": str(cache.limits.num_modules),
    }
    return Origin(digest.hexdigest(), told)


@dataclass(slots=True)
class Link:
    """What is to be written next. Rows are numbered through the whole file, by kind.

    parents, token_ids: of each new block, the row of the one before it (-1: none) and its tokens. rows[name] holds
    the new rows of a layer's store (see `stores`), in pieces. snapshots: row of the node, number of the first
    sliding block, rows of the windows; `carries` beside them. recent: the snapshots in memory, least recently
    used first.
    """

    parents: list[int] = field(default_factory=list)
    num_windows: int = 0
    token_ids: list[tuple[int, ...]] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    snapshots: list[tuple[int, int, list[int]]] = field(default_factory=list)
    carries: list[tuple[Tensor, ...]] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)
    num_bytes: int = 0
    started: float = 0.0


@dataclass(slots=True)
class Position:
    """Where the whole links of a file end, the checksum of the last, how many rows there are, and whose they are.

    A sliding block depends on the same tokens as the full one of the node beside it, so `windows` has its node.
    """

    num_bytes: int = 0
    num_links: int = 0
    last: str = ""
    num_nodes: int = 0
    num_windows: int = 0
    num_snapshots: int = 0
    nodes: WeakKeyDictionary[Node, int] = field(default_factory=WeakKeyDictionary)
    windows: WeakKeyDictionary[Node, int] = field(default_factory=WeakKeyDictionary)
    snapshots: WeakKeyDictionary[Node, int] = field(default_factory=WeakKeyDictionary)


def stores(cache: KVCache) -> Iterator[tuple[str, Tensor, int]]:
    """All tensors whose rows are blocks, with their group."""
    for index, layer in cache.layers.items():
        for name in ("keys", "values", "k_scale", "v_scale"):
            tensor = getattr(layer, name)
            if tensor is not None:
                yield f"{name}.{index}", tensor, layer.group


def window_nodes(node: Node, first: int) -> list[Node]:
    """The nodes of the blocks number `first` to its own, which name the windows of a snapshot there."""
    found: list[Node] = []
    while node.depth > first and node.parent is not None:
        found.append(node)
        node = node.parent
    return found[::-1]


def encode(link: Link, source: Origin, previous: str) -> Iterator[memoryview]:
    """The bytes of a link, a tensor at a time, but for the checksum at its end."""
    tree = {name: getattr(link, name) for name in ("parents", "num_windows", "snapshots", "recent")}
    metadata = {
        "digest": source.digest,
        "origin": json.dumps(source.told),
        "previous": previous,
        "tree": json.dumps(tree),
    }
    block_size = int(source.told["block_size"])
    token_ids = torch.tensor(link.token_ids, dtype=torch.int32).view(-1, block_size)
    tensors = {"token_ids": [token_ids], **link.rows}
    for i, carries in enumerate(link.carries):
        tensors |= {f"carry.{i}.{k}": [carry] for k, carry in enumerate(carries)}
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, pieces in tensors.items():
        num_bytes = sum(piece.nbytes for piece in pieces)
        header[name] = {
            "dtype": _DTYPE_NAMES[pieces[0].dtype],
            "shape": [sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:]],
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    end = offset + _CHECKSUM_BYTES
    header[_CHECKSUM] = {"dtype": "U8", "shape": [_CHECKSUM_BYTES], "data_offsets": [offset, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
    for pieces in tensors.values():
        # In one piece: few and long calls, or the engine's thread would wait for Python's lock over and over.
        yield torch.cat(pieces).flatten().view(torch.uint8).numpy().data


def append(file: BinaryIO, link: Link, source: Origin, previous: str) -> tuple[str, int]:
    """Write a link where the file stands, and see it to the disk; its checksum and the file's size.

    Raises:
        OSError: the disk is full or gone.
    """
    checksum = hashlib.sha256()
    for data in encode(link, source, previous):
        checksum.update(data)
        file.write(data)
    file.write(checksum.digest())
    file.flush()
    os.fsync(file.fileno())
    return checksum.hexdigest(), file.tell()


def check_writable(path: Path) -> None:
    """Make the folder of a cache file, long before it is needed; remove what a process that was killed left.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "\0" in str(path):
            raise FileNotFoundError(f"{str(path)!r} is no name")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is not writable")
        for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the prefix cache cannot be saved: {error}; choose another file") from error


def load(path: Path, cache: KVCache, prefix: PrefixCache, source: Origin) -> Position:
    """Fill an empty cache from a file, the most recent prefixes first if not all fit.

    Raises:
        ConfigError: the file is of another model or layout, or cannot be read.
        DamagedCache: it is damaged; the cache is still empty.
    """
    try:
        with open(path, "rb") as file:
            links = list(_read_links(file, path, source))
            position = Position(
                num_bytes=links[-1].end,
                num_links=len(links),
                last=links[-1].checksum,
                num_nodes=sum(len(link.tree["parents"]) for link in links),
                num_windows=sum(link.tree["num_windows"] for link in links),
                num_snapshots=sum(len(link.tree["snapshots"]) for link in links),
            )
            _restore(links, cache, prefix, position)
            return position
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: the prefix cache cannot be read: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        prefix.clear()
        raise DamagedCache(str(error)) from error


def put_aside(path: Path) -> Path:
    """Give a damaged file another name, in the place of an earlier one; the new name.

    Raises:
        ConfigError: that cannot be.
    """
    aside = path.with_name(f"{path.name}.damaged")
    try:
        return path.replace(aside)
    except OSError as error:
        raise ConfigError(f"{path}: damaged prefix cache that cannot be moved: {error}; delete it") from error


@dataclass(slots=True)
class _StoredLink:
    """A link that was read: the file behind it, what its header says, and where its data begin and it ends."""

    file: BinaryIO
    header: dict[str, Any]
    tree: dict[str, Any]
    start: int
    end: int
    checksum: str

    def read(self, name: str) -> Tensor:
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has another size than its shape")
        self.file.seek(self.start + begin)
        data = bytearray(self.file.read(end - begin))
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.zeros(shape, dtype=dtype)


def _read_links(file: BinaryIO, path: Path, source: Origin) -> Iterator[_StoredLink]:
    """All whole links. What stands behind the last of them was being written when the process was killed.

    Raises:
        ConfigError: they are of another model, configuration or layout.
        ValueError: the first is not whole (it is moved into place when it is), or a byte has changed.
    """
    size = path.stat().st_size
    start, previous = 0, ""
    while start < size:
        link = _read_header(file, start, size)
        if link is None:
            if not start:
                raise ValueError("it is cut off")
            logger.warning("%s: %d bytes at its end were not written completely", path, size - start)
            return
        file.seek(start)
        left, checksum = link.end - start - _CHECKSUM_BYTES, hashlib.sha256()
        while left:
            data = file.read(min(left, _READ_BYTES))
            checksum.update(data)
            left -= len(data)
        if file.read(_CHECKSUM_BYTES) != checksum.digest():
            raise ValueError("its bytes do not match its checksum")
        metadata = link.header.pop("__metadata__")
        if metadata["digest"] != source.digest:
            raise ConfigError(_difference(json.loads(metadata["origin"]), source))
        if metadata["previous"] != previous:
            raise ValueError("its parts do not belong together")
        link.tree = json.loads(metadata["tree"])
        link.checksum = previous = checksum.hexdigest()
        yield link
        start = link.end
    if not start:
        raise ValueError("it is empty")


def _read_header(file: BinaryIO, start: int, size: int) -> _StoredLink | None:
    """The link that begins at `start`; None if the file ends before it does.

    Raises:
        ConfigError: it is a whole header, and of something else.
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    file.seek(start)
    num_bytes = int.from_bytes(file.read(8), "little")
    if start + 8 + num_bytes > size or num_bytes > _MAX_HEADER_BYTES:
        return None
    header = json.loads(file.read(num_bytes))
    if not start and _CHECKSUM not in header and "digest" not in header.get("__metadata__", {}):
        # Somebody's weights, most likely, which must stay where they are.
        raise ConfigError("this is no prefix cache; choose another path")
    data = start + 8 + num_bytes
    end = data + header[_CHECKSUM]["data_offsets"][1]
    if end < data + _CHECKSUM_BYTES:
        raise ValueError("its header is wrong")
    return _StoredLink(file, header, {}, data, end, "") if end <= size else None


def _difference(told: dict[str, str], here: Origin) -> str:
    """Why a file of other origin cannot be used, in words."""
    for name, value in here.told.items():
        if told.get(name) != value:
            what = f"with {name} {told.get(name)}, not {value} as here"
            break
    else:
        what = "by another model or configuration"
    return f"this prefix cache was computed {what}; delete it or choose another path"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A stored snapshot: its number in the file, the link that has its states, and the rows of its blocks."""

    number: int
    link: _StoredLink
    index: int
    path: list[int]
    first: int
    windows: list[int]


def _restore(links: Sequence[_StoredLink], cache: KVCache, prefix: PrefixCache, position: Position) -> None:
    parents = [parent for link in links for parent in link.tree["parents"]]
    token_ids = [row for link in links for row in link.read("token_ids").tolist()]
    if any(not -1 <= parent < row for row, parent in enumerate(parents)):
        raise ValueError("its blocks are not a tree")
    kept, rows = _select(_snapshots(links, parents), cache)
    taken = [
        dict(zip(rows[g], pool.allocate(len(rows[g])), strict=True)) for g, pool in enumerate(cache.pools)
    ]
    try:
        _fill(links, cache, taken)
        for one in kept:
            ids = [token_id for row in one.path for token_id in token_ids[row]]
            node = prefix.insert(ids, [taken[FULL][row] for row in one.path])
            names = [f"carry.{one.index}.{k}" for k in range(cache.limits.num_modules)]
            # All or none: a sequence whose modules slept leaves no states.
            carries = [one.link.read(name) for name in names if f"carry.{one.index}.0" in one.link.header]
            prefix.add_snapshot(
                node,
                one.first,
                [taken[SLIDING][row] for row in one.windows],
                tuple(c.to(cache.device) for c in carries),
            )
            position.nodes.update(zip(window_nodes(node, 0), one.path, strict=True))
            position.windows.update(zip(window_nodes(node, one.first), one.windows, strict=False))
            position.snapshots[node] = one.number
    finally:  # the tree holds what it has
        for group, blocks in enumerate(taken):
            cache.pools[group].release(blocks.values())


def _fill(links: Sequence[_StoredLink], cache: KVCache, taken: Sequence[dict[int, int]]) -> None:
    """Read the rows of `taken`, by group, into the blocks that it names."""
    counts = [[len(link.tree["parents"]) for link in links], [link.tree["num_windows"] for link in links]]
    starts = [[0, *accumulate(count)] for count in counts]
    parts = [
        [[row for row in taken[group] if begin <= row < end] for begin, end in pairwise(s)]
        for group, s in enumerate(starts)
    ]
    for name, tensor, group in stores(cache):
        for link, begin, count, part in zip(links, starts[group], counts[group], parts[group], strict=False):
            if link.header[name]["shape"][0] != count:
                raise ValueError(f"{name} has not the rows of its blocks")
            if part:
                target = torch.tensor([taken[group][row] for row in part], device=tensor.device)
                found = link.read(name)[torch.tensor(part) - begin]
                tensor[target] = found.to(tensor.device)


def _snapshots(links: Sequence[_StoredLink], parents: Sequence[int]) -> list[_Snapshot]:
    """All of them, least recently used first: those that were out of memory when the last link was written, then
    the others in the order that it tells."""
    found: list[_Snapshot] = []
    for link in links:
        for index, (node, first, windows) in enumerate(link.tree["snapshots"]):
            path = []
            while node != -1:
                path.append(node)
                node = parents[node]
            found.append(_Snapshot(len(found), link, index, path[::-1], first, windows))
    place = {number: i for i, number in enumerate(links[-1].tree["recent"])}
    return sorted(found, key=lambda one: (place.get(one.number, -1), one.number))


def _select(
    snapshots: Sequence[_Snapshot], cache: KVCache
) -> tuple[list[_Snapshot], tuple[list[int], list[int]]]:
    """The snapshots that fit, least recently used first, and the rows of their blocks of both groups."""
    rows: tuple[dict[int, None], dict[int, None]] = {}, {}
    kept = []
    for one in reversed(snapshots):
        wanted = one.path, one.windows
        new = [[row for row in wanted[g] if row not in rows[g]] for g in (FULL, SLIDING)]
        if all(len(rows[g]) + len(new[g]) <= cache.pools[g].num_free for g in (FULL, SLIDING)):
            for g in (FULL, SLIDING):
                rows[g].update(dict.fromkeys(new[g]))
            kept.append(one)
    return kept[::-1], (list(rows[FULL]), list(rows[SLIDING]))
