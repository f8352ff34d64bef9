"""The GGUF container: metadata and a directory of tensors, read and written; no tensor is interpreted here.

Standard library only, so that the tokenizer and the configuration can read a GGUF without torch. The file
is never trusted: every length, count and offset is compared with the file's size before anything is
allocated, so a damaged or hostile file ends in one `WeightsError` that names what is wrong and where.
Layout (ggml `docs/gguf.md`, versions 2 and 3, little-endian): magic, version, counts, typed key-value pairs,
tensor directory, padding to `general.alignment`, tensor data. A model split over several files
(`split.count`) is read as one.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stepflash.errors import WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_HEADER_BYTES = 256 << 20  # the real model's header, tokenizer included, has about 6 MB
MAX_DIMS = 4
MAX_ARRAY = 1 << 22  # elements of a metadata array; the largest vocabularies have 2^18 tokens


class GGMLType(NamedTuple):
    """Storage of one tensor type: `block_size` elements of a row take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


GGML_TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
}
TYPE_IDS: dict[str, int] = {ggml_type.name: type_id for type_id, ggml_type in GGML_TYPES.items()}

# Metadata value types: name -> (id, struct code); strings and arrays have no fixed size.
_SCALARS: dict[str, tuple[int, str]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_CODES: dict[int, str] = dict(_SCALARS.values())
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """Where one tensor's bytes are. `shape` is in ggml order: fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    path: Path
    offset: int  # from the start of the file
    num_bytes: int

    @property
    def type_name(self) -> str:
        return GGML_TYPES[self.type_id].name

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF model: of one file, or of all the files that a model was split into."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    paths: tuple[Path, ...] = field(default=())


class TypedValue(NamedTuple):
    """A metadata value for `write_gguf` with its type given, "u32" or "f64"; for a list, that of its elements."""

    type_name: str
    value: Any


class TensorToWrite(NamedTuple):
    """One tensor for `write_gguf`: ggml-order shape, type, and the bytes, which are asked for in turn."""

    shape: tuple[int, ...]
    type_name: str
    chunks: Iterable[bytes | bytearray | memoryview]


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read the header of a GGUF file; for a split model give its first part, the others are found beside it.

    Raises:
        WeightsError: not a GGUF, an unsupported version, damaged, truncated, or a part is absent.
    """
    first = _read_one(Path(path))
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first
    return _join_split(first, count)


def tensor_num_bytes(shape: Sequence[int], ggml_type: GGMLType) -> int:
    """Bytes of a tensor of this ggml-order shape; ValueError if a row is not a whole number of blocks."""
    if shape and shape[0] % ggml_type.block_size:
        raise ValueError(
            f"rows of {shape[0]} elements are not whole {ggml_type.name} blocks of {ggml_type.block_size}"
        )
    return math.prod(shape) // ggml_type.block_size * ggml_type.block_bytes


# ---- reading ----------------------------------------------------------------------------------------------


class _Cursor:
    """Reads little-endian values from a mapped header and refuses to pass its end."""

    def __init__(self, path: Path, data: mmap.mmap, file_bytes: int) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.end = len(data)
        self.file_bytes = file_bytes

    def fail(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path}: damaged GGUF: {what} (at byte {self.position})")

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.end - self.position:
            if self.end < self.file_bytes:
                raise self.fail(f"{what} would need a header of more than {MAX_HEADER_BYTES} bytes")
            raise self.fail(
                f"{what} goes past the end of the file ({self.file_bytes} bytes); is it truncated?"
            )
        start, self.position = self.position, self.position + num_bytes
        return self.data[start : self.position]

    def unpack(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, errors: str = "strict") -> str:
        raw = self.take(self.unpack("Q", what), what)
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def value(self, value_type: int, key: str) -> Any:
        if value_type == _STRING:
            return self.string(f"value of {key!r}", errors="replace")
        if value_type == _ARRAY:
            return self.array(key)
        code = self.code(value_type, key)
        return self.unpack(code, f"value of {key!r}")

    def code(self, value_type: int, key: str) -> str:
        code = _CODES.get(value_type)
        if code is None:
            raise self.fail(f"metadata key {key!r} has the unknown value type {value_type}")
        return code

    def array(self, key: str) -> list[Any]:
        value_type = self.unpack("I", f"type of array {key!r}")
        count = self.unpack("Q", f"length of array {key!r}")
        if value_type == _ARRAY:
            raise self.fail(f"metadata key {key!r} is an array of arrays, which is not supported")
        if count > MAX_ARRAY:
            raise self.fail(f"array {key!r} claims {count} elements, more than {MAX_ARRAY}")
        if value_type == _STRING:
            if count * 8 > self.end - self.position:
                raise self.fail(f"array {key!r} claims {count} strings, more than the file can hold")
            return [self.string(f"element of {key!r}", errors="replace") for _ in range(count)]
        code = self.code(value_type, key)
        raw = self.take(count * struct.calcsize("<" + code), f"array {key!r} of {count} elements")
        return list(struct.unpack(f"<{count}{code}", raw))


def _read_one(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            if file_bytes < 24:
                raise WeightsError(f"{path}: not a GGUF file: only {file_bytes} bytes")
            with mmap.mmap(file.fileno(), min(file_bytes, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data, file_bytes))
    except OSError as error:
        raise WeightsError(f"{path}: cannot read: {error.strerror or error}") from error


def _parse(cursor: _Cursor) -> GGUFFile:
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise WeightsError(f"{cursor.path}: not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    version = cursor.unpack("I", "version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise WeightsError(
                f"{cursor.path}: a big-endian GGUF is not supported; convert it to little-endian"
            )
        raise WeightsError(f"{cursor.path}: GGUF version {version} is not supported (only 2 and 3)")
    num_tensors = cursor.unpack("Q", "tensor count")
    num_pairs = cursor.unpack("Q", "metadata count")
    # The smallest pair has 13 bytes and the smallest directory entry 32.
    if num_pairs * 13 + num_tensors * 32 > cursor.end:
        raise cursor.fail(
            f"it claims {num_pairs} metadata pairs and {num_tensors} tensors, more than it can hold"
        )

    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string("metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.unpack("I", f"type of {key!r}"), key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, not a power of two")

    entries = [_parse_entry(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} appears twice")
        tensors[name] = _locate(cursor, name, shape, type_id, offset, data_start, alignment)
    _check_no_overlap(cursor.path, tensors.values())
    return GGUFFile(cursor.path, version, alignment, metadata, tensors, (cursor.path,))


def _parse_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("tensor name")
    num_dims = cursor.unpack("I", f"rank of tensor {name!r}")
    if num_dims > MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {num_dims} dimensions, at most {MAX_DIMS} are allowed")
    shape = tuple(cursor.unpack("Q", f"shape of tensor {name!r}") for _ in range(num_dims))
    type_id = cursor.unpack("I", f"type of tensor {name!r}")
    return name, shape, type_id, cursor.unpack("Q", f"offset of tensor {name!r}")


def _locate(
    cursor: _Cursor,
    name: str,
    shape: tuple[int, ...],
    type_id: int,
    offset: int,
    data_start: int,
    alignment: int,
) -> GGUFTensor:
    """Check a directory entry against the file and make its offset absolute."""
    ggml_type = GGML_TYPES.get(type_id)
    if ggml_type is None:
        raise WeightsError(f"{cursor.path}: tensor {name!r} has the unknown quantisation type {type_id}")
    if not shape or 0 in shape:
        raise cursor.fail(f"tensor {name!r} has the empty shape {list(shape)}")
    if offset % alignment:
        raise cursor.fail(f"tensor {name!r} starts at {offset}, not a multiple of the alignment {alignment}")
    try:
        num_bytes = tensor_num_bytes(shape, ggml_type)
    except ValueError as error:
        raise cursor.fail(f"tensor {name!r}: {error}") from error
    end = data_start + offset + num_bytes
    if end > cursor.file_bytes:
        raise WeightsError(
            f"{cursor.path}: truncated: tensor {name!r} ends at byte {end} of {cursor.file_bytes}"
        )
    return GGUFTensor(name, shape, type_id, cursor.path, data_start + offset, num_bytes)


def _check_no_overlap(path: Path, tensors: Iterable[GGUFTensor]) -> None:
    previous: GGUFTensor | None = None
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if previous is not None and tensor.offset < previous.offset + previous.num_bytes:
            raise WeightsError(f"{path}: damaged GGUF: tensors {previous.name!r} and {tensor.name!r} overlap")
        previous = tensor


_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def _join_split(first: GGUFFile, count: int) -> GGUFFile:
    """Join a model that llama.cpp's gguf-split wrote as NAME-00001-of-0000N.gguf and so on."""
    match = _SPLIT_NAME.fullmatch(first.path.name)
    if match is None or int(match["count"]) != count:
        raise WeightsError(
            f"{first.path}: part of a model split into {count} files; name it NAME-00001-of-{count:05d}.gguf "
            "beside the other parts"
        )
    if int(match["number"]) != 1:
        raise WeightsError(
            f"{first.path}: part {match['number']} of a split model; give the first part instead"
        )
    tensors = dict(first.tensors)
    paths = [first.path]
    for number in range(2, count + 1):
        path = first.path.with_name(f"{match['prefix']}-{number:05d}-of-{count:05d}.gguf")
        if not path.exists():
            raise WeightsError(f"{path}: absent, but the model is split into {count} files")
        part = _read_one(path)
        if part.metadata.get("split.count") != count or part.metadata.get("split.no") != number - 1:
            raise WeightsError(f"{path}: not part {number} of {count} of {first.path.name}")
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise WeightsError(f"{path}: tensor {twice!r} is also in another part of the model")
        tensors |= part.tensors
        paths.append(path)
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise WeightsError(
            f"{first.path}: the parts hold {len(tensors)} tensors, but {expected} are announced"
        )
    return GGUFFile(first.path, first.version, first.alignment, first.metadata, tensors, tuple(paths))


# ---- writing ----------------------------------------------------------------------------------------------


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorToWrite],
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write a version 3 GGUF, through a temporary file, so that `path` is either whole or untouched.

    Plain values get a type that fits: bool, int -> u32 (i32, u64 or i64 if it must), float -> f32, str, and
    lists of one of these; `TypedValue` says it exactly.

    Raises:
        WeightsError: the disk is full or the folder cannot be written.
        ValueError: a value has no GGUF type, or a tensor's bytes do not fit its shape and type.
    """
    if alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is not a power of two")
    pairs = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT:
        pairs["general.alignment"] = TypedValue("u32", alignment)
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(pairs)))
    for key, value in pairs.items():
        header += _pack_string(key) + _pack_value(key, value)
    offset = 0
    for name, tensor in tensors.items():
        header += _pack_string(name) + struct.pack(
            f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape
        )
        header += struct.pack("<IQ", TYPE_IDS[tensor.type_name], offset)
        offset += -(-_written_bytes(tensor) // alignment) * alignment
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            _pad(file, alignment)
            for name, tensor in tensors.items():
                written = sum(file.write(chunk) for chunk in tensor.chunks)
                if written != _written_bytes(tensor):
                    raise ValueError(
                        f"tensor {name!r}: {written} bytes given, {_written_bytes(tensor)} expected"
                    )
                _pad(file, alignment)
        partial.replace(target)
    except OSError as error:
        raise WeightsError(f"{target}: cannot write: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _written_bytes(tensor: TensorToWrite) -> int:
    return tensor_num_bytes(tensor.shape, GGML_TYPES[TYPE_IDS[tensor.type_name]])


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _pack_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pack_value(key: str, value: Any) -> bytes:
    """Type id and bytes of one metadata value."""
    type_name = ""
    if isinstance(value, TypedValue):
        type_name, value = value
    if isinstance(value, list | tuple):
        name = type_name or _type_name(key, value)
        if name == "str":
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_pack_string, value))
        type_id, code = _SCALARS[name]
        return struct.pack(f"<IIQ{len(value)}{code}", _ARRAY, type_id, len(value), *value)
    name = type_name or _type_name(key, [value])
    if name == "str":
        return struct.pack("<I", _STRING) + _pack_string(value)
    type_id, code = _SCALARS[name]
    return struct.pack(f"<I{code}", type_id, value)


def _type_name(key: str, values: Sequence[Any]) -> str:
    """The metadata type that holds all of `values`."""
    kinds = {type(value) for value in values}
    if kinds == {str}:
        return "str"
    if kinds == {bool}:
        return "bool"
    if kinds == {float}:
        return "f32"
    if kinds == {int}:
        low, high = min(values), max(values)
        for name, (smallest, largest) in _INT_RANGES.items():
            if smallest <= low and high <= largest:
                return name
    raise ValueError(f"metadata key {key!r}: no GGUF type holds {values[:3]!r}; use TypedValue")


_INT_RANGES = {
    "u32": (0, 2**32 - 1),
    "i32": (-(2**31), 2**31 - 1),
    "u64": (0, 2**64 - 1),
    "i64": (-(2**63), 2**63 - 1),
}
