"""GGUF tensors under their released names, decoded to floats.

Differences between the two formats are undone here (spec 6.3): dimensions are listed in reverse, norm weights
carry the +1 that the released ones leave out, newer files may fuse q, k and v. Rotary divisors
(`rope_freqs.weight`) are handed out, not applied: stepflash recomputes them from the configuration by default.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.gguf_file import GGML_TYPES, GGUFFile, GGUFTensor
from stepflash.kernels.formats import PANEL, Format, pack_q4_k, pack_q6_k, pack_q8_0
from stepflash.model.config import ModelConfig
from stepflash.weights.dequantize import DEQUANTIZERS, PLAIN_DTYPES, dequantize
from stepflash.weights.names import EXACT_NORM, ROPE_FREQS, expected, is_norm
from stepflash.weights.packed import row_counts
from stepflash.weights.stored import (
    EXPANDED_CHUNK_BYTES,
    PackedStorage,
    StoredTensor,
    TensorFile,
    plain_values,
)


@dataclass(frozen=True)
class GGUFTensors:
    """Parameters by released name, the names of tensors that are none, and the file's rotary divisors."""

    tensors: dict[str, StoredTensor]
    unexpected: list[str]
    rope_freqs: StoredTensor | None


def read_tensors(gguf: GGUFFile, config: ModelConfig) -> GGUFTensors:
    """Find every tensor of a GGUF; no weight is read.

    Raises:
        WeightsError: a tensor has a quantisation that stepflash does not decode.
    """
    files = {path: TensorFile(path) for path in gguf.paths}
    released = {row.gguf: row.released for row in expected(config)}
    tensors: dict[str, StoredTensor] = {}
    unexpected = []
    rope_freqs = None
    for tensor in _without_fused(gguf, config):
        exact = gguf.metadata.get(EXACT_NORM + tensor.name)
        stored = _stored(released.get(tensor.name, tensor.name), tensor, files[tensor.path], exact)
        if tensor.name == ROPE_FREQS:
            rope_freqs = stored
        elif tensor.name in released:
            tensors[stored.name] = stored
        else:
            unexpected.append(tensor.name)
    return GGUFTensors(tensors, unexpected, rope_freqs)


def _stored(released: str, tensor: GGUFTensor, file: TensorFile, exact: object) -> StoredTensor:
    name = tensor.type_name
    plain = PLAIN_DTYPES.get(name)
    if plain is None and name not in DEQUANTIZERS:
        supported = ", ".join([*PLAIN_DTYPES, *DEQUANTIZERS])
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name!r} is quantised as {name}, which stepflash does not read "
            f"(it reads {supported})"
        )
    # The released norm is w = stored - 1. Both come from a bf16 w, for which 1 + w and back is exact in float32
    # down to |w| = 2^-16; norms are float32 in the network, so nothing is rounded again.
    # Where that is not enough, files written by stepflash carry w itself in their metadata.
    minus = 1.0 if is_norm(tensor.name) else 0.0
    if exact is not None and minus:
        return _exact_norm(released, tensor, exact)
    shape = tensor.shape[::-1]
    view = None
    if plain is not None and not minus and tensor.offset % plain.itemsize == 0:
        view = partial(file.view, tensor.offset, shape, plain)
    return StoredTensor(
        name=released,
        shape=shape,
        dtype_name=name,
        num_bytes=tensor.num_bytes,
        origin=f"{tensor.name} in {tensor.path.name}",
        values=partial(_values, file, tensor, minus),
        view=view,
        view_dtype=plain if view else None,
        packed=_packed(file, tensor) if name in PACKERS and len(shape) > 1 else None,
    )


# Block types that the kernels read without loss: their format, and how rows of blocks are re-arranged.
PACKERS = {
    "Q8_0": (Format.INT8_G32, pack_q8_0),
    "Q4_K": (Format.Q4_K, pack_q4_k),
    "Q6_K": (Format.Q6_K, pack_q6_k),
}


def _packed(file: TensorFile, tensor: GGUFTensor) -> PackedStorage:
    fmt, pack = PACKERS[tensor.type_name]
    k, num_rows = tensor.shape[:2]
    num_matrices = tensor.num_elements // (k * num_rows)
    row_bytes = tensor.num_bytes // (num_rows * num_matrices)

    def pieces() -> Iterator[Tensor]:
        offset = tensor.offset
        for count in row_counts(num_rows, k, PANEL) * num_matrices:
            (chunk,) = file.chunks(offset, count * row_bytes, count * row_bytes, count * row_bytes)
            yield pack(chunk.view(count, row_bytes), k)
            offset += count * row_bytes

    return PackedStorage(fmt, pieces)


def _exact_norm(released: str, tensor: GGUFTensor, exact: object) -> StoredTensor:
    """A norm whose weights are in the metadata."""
    if not isinstance(exact, list) or len(exact) != tensor.num_elements or not isinstance(exact[0], float):
        raise WeightsError(
            f"{tensor.path}: {EXACT_NORM}{tensor.name} must list {tensor.num_elements} floats; convert it again"
        )
    return StoredTensor(
        name=released,
        shape=tensor.shape[::-1],
        dtype_name=tensor.type_name,
        num_bytes=tensor.num_bytes,
        origin=f"{tensor.name} in {tensor.path.name}",
        values=lambda: iter([torch.tensor(exact, dtype=torch.float32)]),
    )


def _values(file: TensorFile, tensor: GGUFTensor, minus: float) -> Iterator[Tensor]:
    """Decoded pieces; `minus` is subtracted in float32."""
    ggml_type = GGML_TYPES[tensor.type_id]
    plain = PLAIN_DTYPES.get(ggml_type.name)
    if plain is not None:
        pieces = plain_values(file, tensor.offset, tensor.num_elements, plain)
    else:
        unit = ggml_type.block_bytes
        chunks = file.chunks(tensor.offset, tensor.num_bytes, unit, EXPANDED_CHUNK_BYTES)
        pieces = (dequantize(chunk.view(-1, unit), ggml_type.name) for chunk in chunks)
    for piece in pieces:
        yield piece.float() - minus if minus else piece


def _without_fused(gguf: GGUFFile, config: ModelConfig) -> Iterator[GGUFTensor]:
    """All tensors, with each `attn_qkv` taken apart: rows are contiguous, so the parts are byte ranges."""
    for tensor in gguf.tensors.values():
        block, _, kind = tensor.name.rpartition(".attn_qkv.")
        layer_idx = block.removeprefix("blk.")
        if kind != "weight" or not layer_idx.isdecimal() or int(layer_idx) >= len(config.layers):
            yield tensor
            continue
        layer = config.layers[int(layer_idx)]
        kv_rows = layer.num_kv_heads * layer.head_dim
        rows = {"q": layer.num_heads * layer.head_dim, "k": kv_rows, "v": kv_rows}
        columns, num_rows = tensor.shape[0], tensor.num_elements // tensor.shape[0]
        if num_rows != sum(rows.values()):
            raise WeightsError(
                f"{tensor.path}: tensor {tensor.name!r} has {num_rows} rows, expected {sum(rows.values())} (q, k, v)"
            )
        row_bytes = tensor.num_bytes // num_rows
        offset = tensor.offset
        for part, count in rows.items():
            name = f"{block}.attn_{part}.weight"
            yield GGUFTensor(name, (columns, count), tensor.type_id, tensor.path, offset, count * row_bytes)
            offset += count * row_bytes


def rotary_divisors(rope_freqs: StoredTensor) -> Tensor:
    """The file's divisors of the rotary frequencies, float32, checked to be usable."""
    values = torch.empty(rope_freqs.shape, dtype=torch.float32)
    rope_freqs.fill(values)
    if not bool((values.isfinite() & (values > 0)).all()):
        raise WeightsError(f"{rope_freqs.origin}: rotary divisors must be positive and finite")
    return values
