"""Packed weights between checkpoints and kernels, piece by piece.

A matrix becomes the bytes that the kernels stream (`stepflash.kernels.formats`) some rows at a time, so that
packing a checkpoint of any size needs a few dozen MiB beside the result. `stepflash quantize` writes those bytes to
files and `load_model(quantization=...)` puts them into memory: the same function makes both, so they are equal.

In a checkpoint the parameter `X.weight` is then the uint8 tensor `X.qweight`, [num_bytes] or [num_experts,
num_bytes], and `quantization_config` in config.json says what it stands for. Its version is
that of this layout and of the panels that the bytes are (csrc/formats.h): another version is refused.

    {"quant_method": "stepflash", "version": 1, "tensors": {"X.weight": {"format": "int4_g32", "shape": [n, k]}}}
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepflash.errors import ConfigError, WeightsError
from stepflash.kernels import cuda_layout, ops
from stepflash.kernels.formats import Format, packed_bytes, parse_format, unpack
from stepflash.weights.names import layer_of
from stepflash.weights.quantized import PackedWeight, Packer
from stepflash.weights.stored import EXPANDED_CHUNK_BYTES, PackedStorage, StoredTensor, TensorFile

QUANT_METHOD, VERSION = "stepflash", 1
SUFFIX = "qweight"
STORED, PLAIN = "stored", "plain"  # values of load_model's `quantization` that are no formats
FLOATS = ("F32", "F16", "BF16")
SLAB_ELEMENTS = 1 << 20
SLAB_ROWS = 128  # a multiple of every format's rows that share something: panels of 32, FP8 blocks of 128


def is_packable(name: str) -> bool:
    """True for the matrices that the kernels read packed; embedding, norms and router stay floats."""
    return name.endswith(("_proj.weight", "shared_head.output.weight", "lm_head.weight"))


def packed_name(released: str) -> str:
    """`X.weight` -> `X.qweight`."""
    return released.removesuffix("weight") + SUFFIX


def released_of(packed: str) -> str:
    """Inverse of `packed_name`."""
    return packed.removesuffix(SUFFIX) + "weight"


def num_packed_bytes(shape: tuple[int, ...], fmt: Format) -> int:
    return math.prod(shape[:-2]) * packed_bytes(fmt, *shape[-2:])


def row_counts(num_rows: int, k: int, multiple: int) -> list[int]:
    """How to cut a matrix into slabs of about a million values: a multiple of rows each, the last what is left."""
    most = max(SLAB_ELEMENTS // k // multiple, 1) * multiple
    return [min(most, num_rows - first) for first in range(0, num_rows, most)]


# ---- floats to packed bytes ---------------------------------------------------------------------------------


def slabs(stored: StoredTensor) -> Iterator[Tensor]:
    """The values of a matrix or of stacked ones as float32 [rows, k]: about a million, in order.

    A slab never reaches into the next matrix, and all but the last of a matrix have a multiple of 128 rows.
    """
    num_rows, k = stored.shape[-2:]
    pieces = stored.values()
    rest = torch.empty(0)
    for count in row_counts(num_rows, k, SLAB_ROWS) * math.prod(stored.shape[:-2]):
        slab = torch.empty(count * k)
        done = 0
        while done < slab.numel():
            if not rest.numel():
                rest = next(pieces).view(-1)
            taken = min(rest.numel(), slab.numel() - done)
            slab[done : done + taken].copy_(rest[:taken])
            rest = rest[taken:]
            done += taken
        yield slab.view(count, k)


def pack_pieces(stored: StoredTensor, fmt: Format) -> Iterator[Tensor]:
    """The packed bytes of a tensor in order, as uint8 pieces; taken over as they are if it is stored in `fmt`.

    NOTE: a piece is only valid until the next one is asked for.

    Raises:
        WeightsError: a value is NaN, infinite or too large for the format.
    """
    if stored.packed is not None and stored.packed.fmt == fmt:
        yield from stored.packed.pieces()
        return
    for slab in slabs(stored):
        yield pack_slab(stored, slab, fmt)


def pack_slab(stored: StoredTensor, slab: Tensor, fmt: Format) -> Tensor:
    """Some rows of a tensor, packed.

    Raises:
        WeightsError: a value is NaN, infinite or too large for the format.
    """
    try:
        return ops.quantize(slab, fmt)
    except ValueError as error:
        raise WeightsError(f"{stored.origin}: cannot be {fmt.name.lower()}: {error}") from error


def hashed(pieces: Iterable[Tensor], digest: Any) -> Iterator[Tensor]:
    """The pieces, with their bytes added to a `hashlib` object on the way."""
    for piece in pieces:
        digest.update(piece.contiguous().view(-1).view(torch.uint8).numpy())
        yield piece


def content_digest(pieces: Iterable[Tensor]) -> str:
    """SHA-256 of everything in the pieces, in hexadecimal."""
    digest = hashlib.sha256()
    for _ in hashed(pieces, digest):
        pass
    return digest.hexdigest()


# ---- packed bytes in a checkpoint ---------------------------------------------------------------------------


def packed_tensors(
    folder: object, quantization: Mapping[str, Any]
) -> dict[str, tuple[Format, tuple[int, ...]]]:
    """Name in the file -> format and logical shape, from the `quantization_config` of a packed checkpoint.

    Raises:
        WeightsError: it is not one that this version reads.
    """
    version, tensors = quantization.get("version"), quantization.get("tensors")
    if version != VERSION or not isinstance(tensors, dict):
        raise WeightsError(
            f"{folder}: quantization_config has version {version!r}; this stepflash reads {VERSION}; quantise again"
        )
    found = {}
    for name, entry in tensors.items():
        try:
            shape = tuple(entry["shape"])
            if len(shape) not in (2, 3) or not all(type(n) is int and n > 0 for n in shape):
                raise ValueError(f"shape is {entry['shape']!r}")
            found[packed_name(name)] = (Format[str(entry["format"]).upper()], shape)
        except (TypeError, KeyError, ValueError) as error:
            raise WeightsError(
                f"{folder}: quantization_config of {name!r} cannot be read: {error}"
            ) from error
    return found


def stored_packed(
    name: str, fmt: Format, shape: tuple[int, ...], file: TensorFile, offset: int, num_bytes: int
) -> StoredTensor:
    """A packed tensor of a checkpoint: its bytes for the kernels, its values for everything else.

    Raises:
        WeightsError: the number of bytes is not that of the format and shape.
    """
    needed = num_packed_bytes(shape, fmt)
    origin = f"{packed_name(name)} in {file.path.name}"
    if num_bytes != needed:
        raise WeightsError(
            f"{origin}: {num_bytes} bytes, but {fmt.name.lower()} of {list(shape)} has {needed}"
        )
    return StoredTensor(
        name=name,
        shape=shape,
        dtype_name=fmt.name,
        num_bytes=num_bytes,
        origin=origin,
        values=partial(_values, fmt, shape, file, offset, num_bytes),
        packed=PackedStorage(fmt, lambda: file.chunks(offset, num_bytes, 1, EXPANDED_CHUNK_BYTES)),
    )


def _values(
    fmt: Format, shape: tuple[int, ...], file: TensorFile, offset: int, num_bytes: int
) -> Iterator[Tensor]:
    """Decoded float32 pieces of whole panels."""
    num_rows, k = shape[-2:]
    panel = packed_bytes(fmt, 1, k)
    panels_per_matrix = -(-num_rows // 32)
    done = 0
    for chunk in file.chunks(offset, num_bytes, panel, 4 * SLAB_ELEMENTS):
        for piece in torch.split(chunk.view(-1, panel), max(SLAB_ELEMENTS // (32 * k), 1)):
            rows = unpack(piece.reshape(-1), fmt, 32 * piece.shape[0], k)
            # The last panel of a matrix is filled up with zero rows.
            row = torch.arange(done, done + piece.shape[0])[:, None] % panels_per_matrix * 32 + torch.arange(
                32
            )
            yield rows[(row < num_rows).flatten()]
            done += piece.shape[0]


def draft_formats(tensors: Mapping[str, StoredTensor], num_layers: int, name: str) -> dict[str, str]:
    """The prediction modules' matrices that are stored as plain floats, each with this format; head gates stay."""
    return {
        tensor.name: name
        for tensor in tensors.values()
        if tensor.dtype_name in FLOATS
        and is_packable(tensor.name)
        and not tensor.name.endswith("g_proj.weight")
        and (layer := layer_of(tensor.name)) is not None
        and layer >= num_layers
    }


# ---- into the network ---------------------------------------------------------------------------------------


class StoredPacker(Packer):
    """Packs weights from where they are stored; the network's own parameters are only asked for their names.

    Args:
        default: a format, or "stored": what a tensor is stored in if the kernels read that, else the nearest
            (bf16 for floats, int8 for other blocks; on a GPU for Q4_K and Q6_K, too).
        on_pieces: passes on the stored bytes of a tensor that is taken over unchanged; the loader's digests.
        on_done: called after each tensor.
        device: where each tensor goes as soon as it is packed, so that host memory holds one of them at a time.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        default: str,
        protect: Mapping[str, str],
        on_pieces: Callable[[StoredTensor, Iterator[Tensor]], Iterator[Tensor]] | None = None,
        on_done: Callable[[StoredTensor], None] = lambda _: None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(default, protect)
        self.tensors, self.on_pieces, self.on_done, self.device = tensors, on_pieces, on_done, device
        self._unequal: set[str] = set()

    def swiglu(self, prefix: str, gate: Tensor, up: Tensor, down: Tensor) -> nn.ModuleList:
        """The kernels read gate and up in one format: where they are stored in two, both become bf16."""
        pair = [f"{prefix}.{part}_proj.weight" for part in ("gate", "up")]
        if len({format_of(self.tensors[name], self.format_name(name)) for name in pair}) > 1:
            self._unequal.update(pair)
        return super().swiglu(prefix, gate, up, down)

    def pack(self, name: str, weight: Tensor) -> PackedWeight:
        stored = self.tensors[name]
        fmt = Format.BF16 if name in self._unequal else format_of(stored, self.format_name(name))
        if not cuda_layout.is_supported(fmt) and ops.wants_tiles(torch.device(self.device)):
            fmt = parse_format("int8", stored.shape[-1])
        pieces = pack_pieces(stored, fmt)
        if self.on_pieces is not None and stored.packed is not None and stored.packed.fmt == fmt:
            pieces = self.on_pieces(stored, pieces)
        packed = PackedWeight.from_pieces(stored.shape, fmt, pieces).to(self.device)
        self.on_done(stored)
        return packed


def format_of(stored: StoredTensor, name: str) -> Format:
    """The format called `name` for this tensor; "stored" is explained at `StoredPacker`.

    Raises:
        ConfigError: unknown, or only GGUF files have it.
    """
    if name == STORED:
        if stored.packed is not None:
            return stored.packed.fmt
        name = "bf16" if stored.dtype_name in FLOATS else "int8"
    try:
        fmt = parse_format(name, stored.shape[-1])
    except ValueError as error:
        raise ConfigError(f"cannot quantise {stored.name}: {error}") from error
    if fmt in (Format.Q4_K, Format.Q6_K) and (stored.packed is None or stored.packed.fmt != fmt):
        raise ConfigError(
            f"cannot quantise {stored.name}: {name} is read from GGUF files, not made here; use int4"
        )
    return fmt


def match(rules: Iterable[tuple[str, str]], name: str, default: str) -> str:
    """The format of the first shell pattern that matches a released name."""
    return next((fmt for pattern, fmt in rules if fnmatchcase(name, pattern)), default)
