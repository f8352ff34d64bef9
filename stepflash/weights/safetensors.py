"""Safetensors folders: headers read strictly, tensors found under their released names.

The header parser is our own because the file is not trusted: lengths are compared with the file's size before
anything is allocated, and every byte of the data must belong to exactly one tensor. A weight is FP8 if and only
if its dtype says so; its block scales then lie in the sibling `..._scale_inv` (spec 5.3). Experts may be stacked,
as released, or split one by one. Weights packed by `stepflash quantize` are described in `packed.py`.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.kernels.formats import Format, pack_fp8
from stepflash.weights.known_bad import FOREIGN_METHODS
from stepflash.weights.names import SCALE_SUFFIX, VISION_PREFIXES, Shape, released_name, scale_shape
from stepflash.weights.packed import QUANT_METHOD, packed_tensors, released_of, row_counts, stored_packed
from stepflash.weights.stored import (
    EXPANDED_CHUNK_BYTES,
    PackedStorage,
    StoredTensor,
    TensorFile,
    plain_values,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPE_BYTES = {
    name: num_bytes
    for num_bytes, names in (
        (1, "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0"),
        (2, "U16 I16 F16 BF16"),
        (4, "U32 I32 F32"),
        (8, "U64 I64 F64"),
    )
    for name in names.split()
}
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = "F8_E4M3"


class Entry(NamedTuple):
    """One tensor of a safetensors header; `offset` counts from the start of the file."""

    file: TensorFile
    name: str
    dtype_name: str
    shape: Shape
    offset: int
    num_bytes: int

    @property
    def origin(self) -> str:
        return f"{self.name} in {self.file.path.name}"


@dataclass(frozen=True)
class SafetensorsFolder:
    """Parameters by released name, and the names of tensors that are none: of the image tower, or unknown."""

    tensors: dict[str, StoredTensor]
    vision: list[str]
    unexpected: list[str]


def read_folder(folder: Path, raw_config: Mapping[str, Any]) -> SafetensorsFolder:
    """Read all headers of a checkpoint folder; no weight is read.

    Args:
        raw_config: the parsed config.json, for its `quantization_config`.
    Raises:
        WeightsError: an absent, truncated or damaged file, an index that disagrees with the shards, an
            unsupported storage format, experts missing from a split checkpoint.
    """
    block = fp8_block(folder, raw_config)
    packed = _packed_tensors(folder, raw_config)
    entries = read_entries(folder)
    vision = sorted(name for name in entries if name.startswith(VISION_PREFIXES))
    groups: dict[str, dict[int | None, Entry]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if name in packed:
            stored = _stored_packed(entry, *packed[name])
            tensors[stored.name] = stored
        elif not name.startswith(VISION_PREFIXES):
            released, expert = released_name(name)
            parts = groups.setdefault(released, {})
            if expert in parts:
                raise WeightsError(f"{folder}: {name} and {parts[expert].name} are the same parameter")
            parts[expert] = entry

    used_scales: set[str] = set()
    for released, parts in groups.items():
        if released.endswith(SCALE_SUFFIX):
            continue
        if released in tensors:
            raise WeightsError(f"{folder}: {released} is there both packed and as floats")
        scales = groups.get(released + SCALE_SUFFIX, {})
        pieces = []
        for expert, entry in _in_order(folder, released, parts):
            pieces.append(_stored(released, entry, scales.get(expert), block))
            if entry.dtype_name == FP8 and expert in scales:
                used_scales.add(scales[expert].name)
        tensors[released] = pieces[0] if None in parts else _stacked(released, pieces)
    unexpected = [
        entry.name
        for released, parts in groups.items()
        if released.endswith(SCALE_SUFFIX)
        for entry in parts.values()
        if entry.name not in used_scales
    ]
    return SafetensorsFolder(tensors, vision, unexpected)


def _quantization(raw_config: Mapping[str, Any]) -> tuple[Any, Any]:
    """`quantization_config` and its method, of the text model or of what wraps it."""
    inner = raw_config.get("text_config")
    quantization = raw_config.get("quantization_config")
    if quantization is None and isinstance(inner, Mapping):
        quantization = inner.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    return quantization, method


def fp8_block(folder: Path, raw_config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share one scale. Refuses quantisation methods other than block FP8 and our own."""
    quantization, method = _quantization(raw_config)
    if quantization is None or method == QUANT_METHOD:
        return 128, 128
    if method != "fp8":
        raise WeightsError(
            f"{folder}: quantised with {method!r}; stepflash reads bf16, fp16, fp32 and fp8 (128 x 128 blocks) "
            f"safetensors, its own packed ones, and GGUF{_known(method)}"
        )
    block = quantization.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise WeightsError(
            f"{folder}: quantization_config.weight_block_size is {block!r}, not two positive integers"
        )
    return block[0], block[1]


def _known(method: object) -> str:
    return (
        f"; known bad: {FOREIGN_METHODS[method]}"
        if isinstance(method, str) and method in FOREIGN_METHODS
        else ""
    )


def _packed_tensors(folder: Path, raw_config: Mapping[str, Any]) -> dict[str, tuple[Format, Shape]]:
    quantization, method = _quantization(raw_config)
    return packed_tensors(folder, quantization) if method == QUANT_METHOD else {}


def _stored_packed(entry: Entry, fmt: Format, shape: Shape) -> StoredTensor:
    if entry.dtype_name != "U8":
        raise WeightsError(f"{entry.file.path}: packed tensor {entry.name!r} is {entry.dtype_name}, not U8")
    return stored_packed(released_of(entry.name), fmt, shape, entry.file, entry.offset, entry.num_bytes)


# ---- files and headers --------------------------------------------------------------------------------------


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder: of the shards in its index, or of its only file."""
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        path = _only_file(folder)
        return {entry.name: entry for entry in read_header(path)}
    weight_map = _read_index(index_path)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if not path.is_file():
            raise WeightsError(f"{path}: absent, but {INDEX_NAME} lists it")
        for entry in read_header(path):
            listed = weight_map.get(entry.name)
            if listed != shard:
                where = f"in {listed}" if listed else "nowhere"
                raise WeightsError(f"{path}: holds tensor {entry.name!r}, which {INDEX_NAME} lists {where}")
            entries[entry.name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise WeightsError(
                f"{folder / shard}: tensor {name!r} is absent, but {INDEX_NAME} lists it there"
            )
    return entries


def _only_file(folder: Path) -> Path:
    if (folder / SINGLE_NAME).is_file():
        return folder / SINGLE_NAME
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(f"{folder}: {len(found)} safetensors files but no {INDEX_NAME}; download it too")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise WeightsError(
            f"{folder}: holds pickled weights only; convert them to safetensors (pickles can run code)"
        )
    raise WeightsError(f"{folder}: no {INDEX_NAME} and no *.safetensors file")


def is_file_name(text: str) -> bool:
    """Whether a file beside the one that names it can have this name."""
    return (
        bool(text)
        and "\0" not in text
        and Path(text).name == text
        and len(text.encode(errors="replace")) < 256
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_file_name(shard):
            raise WeightsError(f"{path}: tensor {name!r} is mapped to {shard!r}, which is not a file name")
    return weight_map


def read_header(path: Path) -> list[Entry]:
    """The tensors of one safetensors file, checked against its size.

    Raises:
        WeightsError: damaged or truncated; the message says where.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise WeightsError(
                    f"{path}: damaged or truncated: {file_bytes} bytes cannot hold a header of {header_bytes}"
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise WeightsError(f"{path}: cannot read: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] or type(error).__name__
        raise WeightsError(f"{path}: damaged header: not valid JSON: {reason}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: damaged header: not a JSON object")
    data_start = 8 + header_bytes
    source = TensorFile(path)
    header.pop("__metadata__", None)
    entries = [_entry(source, name, value, data_start) for name, value in header.items()]
    end = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.offset != end:
            raise WeightsError(
                f"{path}: damaged header: tensor {entry.name!r} overlaps another or leaves a gap"
            )
        end += entry.num_bytes
    if end > file_bytes:
        raise WeightsError(f"{path}: truncated: its header describes {end} bytes, the file has {file_bytes}")
    if end < file_bytes:
        raise WeightsError(f"{path}: damaged: {file_bytes - end} bytes after the last tensor")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


def _entry(file: TensorFile, name: str, value: object, data_start: int) -> Entry:
    def fail(what: str) -> WeightsError:
        return WeightsError(f"{file.path}: damaged header: tensor {name!r} {what}")

    if not isinstance(value, dict):
        raise fail("is not an object")
    dtype_name: Any = value.get("dtype")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPE_BYTES:
        raise fail(f"has the unknown dtype {dtype_name!r}")
    if not _are_counts(shape):
        raise fail("has no valid shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("has no valid data_offsets")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype_name]
    if offsets[1] - offsets[0] != num_bytes:
        raise fail(f"takes {offsets[1] - offsets[0]} bytes, but {dtype_name} {shape} needs {num_bytes}")
    return Entry(file, name, dtype_name, tuple(shape), data_start + offsets[0], num_bytes)


def _are_counts(value: Any) -> bool:
    # A JSON true is a Python int; type() tells them apart.
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


# ---- parameters ---------------------------------------------------------------------------------------------


def _in_order(folder: Path, released: str, parts: dict[int | None, Entry]) -> list[tuple[int | None, Entry]]:
    """A whole parameter, or its experts from 0 without a gap."""
    if None in parts:
        if len(parts) > 1:
            raise WeightsError(f"{folder}: {released} is there both stacked and split per expert")
        return list(parts.items())
    by_expert = {expert: entry for expert, entry in parts.items() if expert is not None}
    absent = sorted(set(range(max(by_expert) + 1)) - set(by_expert))
    if absent:
        raise WeightsError(f"{folder}: expert {absent[0]} of {released} is absent ({len(absent)} in all)")
    return [(expert, by_expert[expert]) for expert in sorted(by_expert)]


def _stored(released: str, entry: Entry, scale: Entry | None, block: tuple[int, int]) -> StoredTensor:
    if entry.dtype_name == FP8:
        return _stored_fp8(released, entry, scale, block)
    dtype = PLAIN_DTYPES.get(entry.dtype_name)
    if dtype is None:
        raise WeightsError(
            f"{entry.file.path}: tensor {entry.name!r} is stored as {entry.dtype_name}; supported: "
            f"{', '.join(PLAIN_DTYPES)} and {FP8} with block scales"
        )
    aligned = entry.offset % dtype.itemsize == 0 and entry.num_bytes > 0
    return StoredTensor(
        name=released,
        shape=entry.shape,
        dtype_name=entry.dtype_name,
        num_bytes=entry.num_bytes,
        origin=entry.origin,
        values=lambda: plain_values(entry.file, entry.offset, math.prod(entry.shape), dtype),
        view=(lambda: entry.file.view(entry.offset, entry.shape, dtype)) if aligned else None,
        view_dtype=dtype if aligned else None,
    )


def _stored_fp8(released: str, entry: Entry, scale: Entry | None, block: tuple[int, int]) -> StoredTensor:
    where = f"{entry.file.path}: tensor {entry.name!r}"
    if scale is None:
        raise WeightsError(f"{where} is FP8, but {entry.name}{SCALE_SUFFIX} is absent")
    if len(entry.shape) < 2:
        raise WeightsError(f"{where} is FP8 with shape {list(entry.shape)}; only matrices have block scales")
    if scale.dtype_name not in PLAIN_DTYPES:
        raise WeightsError(
            f"{scale.file.path}: scale {scale.name!r} is stored as {scale.dtype_name}, not as floats"
        )
    needed = scale_shape(entry.shape, block)
    if scale.shape != needed:
        raise WeightsError(
            f"{scale.file.path}: scale {scale.name!r} has shape {list(scale.shape)}, expected {list(needed)} for "
            f"blocks of {block[0]} x {block[1]}"
        )
    return StoredTensor(
        name=released,
        shape=entry.shape,
        dtype_name=FP8,
        num_bytes=entry.num_bytes + scale.num_bytes,
        origin=entry.origin,
        values=lambda: _fp8_values(entry, scale, block),
        scales=lambda: read_scale(scale),
        packed=PackedStorage(Format.FP8, lambda: _fp8_packed(entry, scale)) if block == (128, 128) else None,
    )


def _fp8_packed(entry: Entry, scale: Entry) -> Iterator[Tensor]:
    """The same bytes and scales in the order of the kernels."""
    num_rows, k = entry.shape[-2:]
    scales = read_scale(scale).view(-1, *scale.shape[-2:])  # [num_matrices, row blocks, column blocks]
    offset = entry.offset
    for matrix in scales:
        block_rows = 0
        for count in row_counts(num_rows, k, 128):
            (chunk,) = entry.file.chunks(offset, count * k, count * k, count * k)
            rows = chunk.view(torch.float8_e4m3fn).view(count, k)
            yield pack_fp8(rows, matrix[block_rows : block_rows + -(-count // 128)])
            offset += count * k
            block_rows += count // 128


def read_scale(scale: Entry) -> Tensor:
    """The block scales of an FP8 tensor, float32. Raises WeightsError for NaN and infinity."""
    pieces = plain_values(scale.file, scale.offset, math.prod(scale.shape), PLAIN_DTYPES[scale.dtype_name])
    values = torch.cat([piece.float() for piece in pieces]).view(scale.shape)
    num_bad = int((~values.isfinite()).sum())
    if num_bad:
        raise WeightsError(f"{scale.file.path}: scale {scale.name!r} has {num_bad} NaN or infinite values")
    return values


def _fp8_values(entry: Entry, scale: Entry, block: tuple[int, int]) -> Iterator[Tensor]:
    """W = fp8 * scale of its block (spec 5.3), some rows at a time; rows of stacked experts count on."""
    num_rows, num_columns = entry.shape[-2:]
    scales = read_scale(scale)
    scales = scales.view(-1, *scales.shape[-2:])  # [num_matrices, row blocks, column blocks]
    first = 0
    for chunk in entry.file.chunks(entry.offset, entry.num_bytes, num_columns, EXPANDED_CHUNK_BYTES):
        values = chunk.view(torch.float8_e4m3fn).view(-1, num_columns).float()
        rows = torch.arange(first, first + values.shape[0])
        row_scales = scales[rows // num_rows, rows % num_rows // block[0]]  # [rows, column blocks]
        values *= row_scales.repeat_interleave(block[1], dim=1)[:, :num_columns]
        yield values
        first += values.shape[0]


def _stacked(released: str, pieces: list[StoredTensor]) -> StoredTensor:
    """Experts that were stored one by one, as the one tensor that the network has."""
    shapes = {piece.shape for piece in pieces}
    if len(shapes) > 1:
        shown = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
        raise WeightsError(f"{released}: its experts have different shapes: {shown}")
    scales = [piece.scales for piece in pieces if piece.scales is not None]
    return StoredTensor(
        name=released,
        shape=(len(pieces), *pieces[0].shape),
        dtype_name="+".join(sorted({piece.dtype_name for piece in pieces})),
        num_bytes=sum(piece.num_bytes for piece in pieces),
        origin=f"{pieces[0].origin} and {len(pieces) - 1} more experts",
        values=lambda: itertools.chain.from_iterable(piece.values() for piece in pieces),
        scales=(lambda: torch.stack([read() for read in scales])) if scales else None,
        packed=_chained([piece.packed for piece in pieces]),
    )


def _chained(parts: list[PackedStorage | None]) -> PackedStorage | None:
    """All experts packed one after the other, if they share a format."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts) or len({part.fmt for part in present}) != 1:
        return None
    return PackedStorage(
        present[0].fmt, lambda: itertools.chain.from_iterable(part.pieces() for part in present)
    )
