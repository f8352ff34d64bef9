"""The prefix cache on disk, so that conversations survive a restart.

One safetensors file holds the blocks of every snapshot's prefix, the snapshots' windows and states, and as
metadata a digest of the network that computed them; its last tensor is the SHA-256 of all bytes before it. A file
of another model, configuration or cache layout, or with a single byte changed, is refused, never reinterpreted.
It is written beside its final name and moved there when complete.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepflash.engine.kv_cache import FULL, SLIDING, KVCache
from stepflash.engine.prefix import Node, PrefixCache
from stepflash.errors import ConfigError
from stepflash.model.transformer import Step3p5ForCausalLM

_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int32: "I32",
}
_VERSION = "3"
_CHECKSUM = "sha256"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_READ_BYTES = 4 << 20
# Values of each parameter that enter the digest: enough to tell two trainings apart, few enough to be instant.
_NUM_SAMPLES = 64


def model_digest(model: Step3p5ForCausalLM, cache: KVCache) -> str:
    """Identifies what cached keys and values depend on: configuration, weights (sampled), layout and dtype."""
    layout = [tuple(layer.keys.shape[1:]) for layer in cache.layers.values()]
    digest = hashlib.sha256(f"{_VERSION} {model.config} {layout} {cache.limits.dtype}".encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        step = max(1, flat.shape[0] // _NUM_SAMPLES)
        sample = flat[::step].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


# Name, dtype, shape and reader of a tensor.
_Stored = tuple[str, torch.dtype, list[int], Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What goes into a file: nodes with parents first, the snapshots least recently used first."""

    nodes: list[Node]
    snapshots: list[tuple[int, Node]]  # (number of MTP modules, node)
    sliding: list[int]


@dataclass(frozen=True, slots=True)
class _Record:
    """One stored snapshot: row of its node, number of its first sliding block, rows of its sliding blocks."""

    num_modules: int
    node: int
    first: int
    sliding: list[int]


def save(path: Path, cache: KVCache, prefix: PrefixCache, digest: str, max_bytes: int) -> int:
    """Write the most recently used prefixes that fit into `max_bytes`; the number of snapshots written.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    plan = _plan(cache, prefix, max_bytes)
    position = {node: row for row, node in enumerate(plan.nodes)}
    window_position = {block_id: row for row, block_id in enumerate(plan.sliding)}
    tree = {
        "parents": [-1 if node.parent is None else position.get(node.parent, -1) for node in plan.nodes],
        "snapshots": [
            (
                num_modules,
                position[node],
                node.snapshot.first,
                [window_position[block_id] for block_id in node.snapshot.block_ids],
            )
            for num_modules, node in plan.snapshots
            if node.snapshot is not None
        ],
    }
    tensors = list(_tensors(cache, plan))
    header: dict[str, object] = {"__metadata__": {"digest": digest, "tree": json.dumps(tree)}}
    offset = 0
    for name, dtype, shape, _ in tensors:
        size = dtype.itemsize
        for n in shape:
            size *= n
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header[_CHECKSUM] = {
        "dtype": "U8",
        "shape": [_CHECKSUM_BYTES],
        "data_offsets": [offset, offset + _CHECKSUM_BYTES],
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            checksum = hashlib.sha256()
            # One layer at a time: a large cache is not copied as a whole.
            head = memoryview(len(encoded).to_bytes(8, "little") + encoded)
            for data in itertools.chain((head,), map(_bytes, tensors)):
                checksum.update(data)
                file.write(data)
            file.write(checksum.digest())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(plan.snapshots)


def check_writable(path: Path) -> None:
    """Make the folder of a cache file, long before `save` needs it; remove what a process that was killed left.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is not writable")
        for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the prefix cache cannot be saved: {error}; choose another file") from error


def load(path: Path, cache: KVCache, prefix: PrefixCache, digest: str) -> int:
    """Fill an empty cache from a file, the most recent prefixes first if not all fit; snapshots restored.

    Raises:
        ConfigError: the file is damaged, or of another model or layout; delete it to go on.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("digest") != digest:
                raise ConfigError(
                    f"{path}: this prefix cache was computed by another model or configuration; "
                    "delete it or choose another path"
                )
            _verify(path)
            tree = json.loads(metadata["tree"])
            records = [_Record(*record) for record in tree["snapshots"]]
            return _restore(tree["parents"], records, file.get_tensor, cache, prefix)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: the prefix cache cannot be read: {error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: damaged prefix cache ({error}); delete it") from error


def _verify(path: Path) -> None:
    """Compare the file with the checksum at its end.

    Raises:
        ValueError: a byte has changed.
    """
    checksum = hashlib.sha256()
    left = path.stat().st_size - _CHECKSUM_BYTES
    with open(path, "rb") as file:
        while left > 0:
            data = file.read(min(left, _READ_BYTES))
            if not data:
                break
            checksum.update(data)
            left -= len(data)
        if file.read() != checksum.digest():
            raise ValueError("its bytes do not match its checksum")


def _plan(cache: KVCache, prefix: PrefixCache, max_bytes: int) -> _Plan:
    nodes: dict[Node, None] = {}
    sliding: dict[int, None] = {}
    chosen: list[tuple[int, Node]] = []
    used = 0
    for num_modules, node in reversed(list(prefix.snapshots())):
        assert node.snapshot is not None
        path = [ancestor for ancestor in _path(node) if ancestor not in nodes]
        windows = [block_id for block_id in node.snapshot.block_ids if block_id not in sliding]
        cost = len(path) * cache.block_bytes[FULL] + len(windows) * cache.block_bytes[SLIDING]
        if used + cost > max_bytes:
            continue
        used += cost
        nodes.update(dict.fromkeys(path))
        sliding.update(dict.fromkeys(windows))
        chosen.append((num_modules, node))
    return _Plan(sorted(nodes, key=lambda n: n.depth), chosen[::-1], list(sliding))


def _path(node: Node) -> list[Node]:
    """From the first block to this node; the root is not a block."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _bytes(stored: _Stored) -> memoryview:
    return stored[3]().contiguous().cpu().flatten().view(torch.uint8).numpy().data


def _tensors(cache: KVCache, plan: _Plan) -> Iterator[_Stored]:
    """Everything that is stored."""
    tokens = torch.tensor([node.token_ids for node in plan.nodes], dtype=torch.int32)
    yield "token_ids", torch.int32, [len(plan.nodes), cache.block_size], lambda: tokens
    ids = {FULL: [node.block_id for node in plan.nodes], SLIDING: plan.sliding}
    for name, tensor, group in _stores(cache):
        index = torch.tensor(ids[group], dtype=torch.long, device=tensor.device)
        shape = [len(ids[group]), *tensor.shape[1:]]
        yield name, tensor.dtype, shape, lambda tensor=tensor, index=index: tensor[index]  # type: ignore[misc]
    for i, (_, node) in enumerate(plan.snapshots):
        assert node.snapshot is not None
        for k, carry in enumerate(node.snapshot.carries):
            yield f"carry.{i}.{k}", carry.dtype, list(carry.shape), lambda carry=carry: carry  # type: ignore[misc]


def _stores(cache: KVCache) -> Iterator[tuple[str, Tensor, int]]:
    """All tensors whose rows are blocks, with their group."""
    for index, layer in cache.layers.items():
        for name in ("keys", "values", "k_scale", "v_scale"):
            tensor = getattr(layer, name)
            if tensor is not None:
                yield f"{name}.{index}", tensor, layer.group


def _restore(
    parents: list[int],
    records: list[_Record],
    read: Callable[[str], Tensor],
    cache: KVCache,
    prefix: PrefixCache,
) -> int:
    token_ids = read("token_ids").tolist()
    paths = [_rows_to(record.node, parents) for record in records]
    kept, nodes, windows = _select(paths, records, cache)
    taken = {
        FULL: dict(zip(nodes, cache.pools[FULL].allocate(len(nodes)), strict=True)),
        SLIDING: dict(zip(windows, cache.pools[SLIDING].allocate(len(windows)), strict=True)),
    }
    for name, tensor, group in _stores(cache):
        source = torch.tensor(list(taken[group]), dtype=torch.long)
        target = torch.tensor(list(taken[group].values()), dtype=torch.long, device=tensor.device)
        tensor[target] = read(name)[source].to(tensor.device)
    for i in kept:
        record = records[i]
        ids = [token_id for row in paths[i] for token_id in token_ids[row]]
        node = prefix.insert(ids, [taken[FULL][row] for row in paths[i]], record.num_modules)
        carries = tuple(read(f"carry.{i}.{k}").to(cache.device) for k in range(record.num_modules))
        prefix.add_snapshot(node, record.first, [taken[SLIDING][row] for row in record.sliding], carries)
    # The tree holds them now.
    for group, blocks in taken.items():
        cache.pools[group].release(blocks.values())
    return len(kept)


def _rows_to(node: int, parents: list[int]) -> list[int]:
    """Rows of all blocks from the first to this one; parents stand before their children."""
    rows = []
    while node != -1:
        if not -1 <= parents[node] < node:
            raise ValueError("its blocks are not a tree")
        rows.append(node)
        node = parents[node]
    return rows[::-1]


def _select(
    paths: list[list[int]], records: list[_Record], cache: KVCache
) -> tuple[list[int], list[int], list[int]]:
    """The snapshots that fit, least recently used first, with the rows of their nodes and windows."""
    nodes: dict[int, None] = {}
    windows: dict[int, None] = {}
    kept = []
    for i in range(len(records) - 1, -1, -1):
        more = nodes | dict.fromkeys(paths[i])
        wider = windows | dict.fromkeys(records[i].sliding)
        if len(more) <= cache.pools[FULL].num_free and len(wider) <= cache.pools[SLIDING].num_free:
            nodes, windows = more, wider
            kept.append(i)
    return kept[::-1], list(nodes), list(windows)
