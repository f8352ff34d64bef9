"""GGUF tensors under their released names, decoded to floats.

Differences between the two formats are undone here (spec 6.3): dimensions are listed in reverse, norm weights
carry the +1 that the released ones leave out, newer files may fuse q, k and v. Rotary divisors
(`rope_freqs.weight`) are handed out, not applied: stepflash recomputes them from the configuration by default.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.gguf_file import GGML_TYPES, GGUFFile, GGUFTensor
from stepflash.model.config import ModelConfig
from stepflash.weights.dequantize import DEQUANTIZERS, PLAIN_DTYPES, dequantize
from stepflash.weights.names import ROPE_FREQS, expected, is_norm
from stepflash.weights.stored import EXPANDED_CHUNK_BYTES, StoredTensor, TensorFile, fill_plain


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
        stored = _stored(released.get(tensor.name, tensor.name), tensor, files[tensor.path])
        if tensor.name == ROPE_FREQS:
            rope_freqs = stored
        elif tensor.name in released:
            tensors[stored.name] = stored
        else:
            unexpected.append(tensor.name)
    return GGUFTensors(tensors, unexpected, rope_freqs)


def _stored(released: str, tensor: GGUFTensor, file: TensorFile) -> StoredTensor:
    name = tensor.type_name
    plain = PLAIN_DTYPES.get(name)
    if plain is None and name not in DEQUANTIZERS:
        supported = ", ".join([*PLAIN_DTYPES, *DEQUANTIZERS])
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name!r} is quantised as {name}, which stepflash does not read "
            f"(it reads {supported})"
        )
    # The released norm is w = stored - 1. Both come from a bf16 w, for which 1 + w and back is exact in float32
    # down to |w| = 2^-15; norms are float32 in the network, so nothing is rounded again.
    minus = 1.0 if is_norm(tensor.name) else 0.0
    shape = tensor.shape[::-1]
    fill: Callable[[Tensor], None]
    view = None
    if plain is None:
        fill = partial(_fill_blocks, file, tensor, minus)
    else:
        fill = partial(fill_plain, file, tensor.offset, plain, minus=minus)
        if not minus and tensor.offset % plain.itemsize == 0:
            view = partial(file.view, tensor.offset, shape, plain)
    return StoredTensor(
        name=released,
        shape=shape,
        dtype_name=name,
        num_bytes=tensor.num_bytes,
        origin=f"{tensor.name} in {tensor.path.name}",
        fill=fill,
        view=view,
        view_dtype=plain if view else None,
    )


def _fill_blocks(file: TensorFile, tensor: GGUFTensor, minus: float, out: Tensor) -> None:
    ggml_type = GGML_TYPES[tensor.type_id]
    flat = out.view(-1)
    done = 0
    for chunk in file.chunks(tensor.offset, tensor.num_bytes, ggml_type.block_bytes, EXPANDED_CHUNK_BYTES):
        values = dequantize(chunk.view(-1, ggml_type.block_bytes), ggml_type.name).view(-1)
        flat[done : done + values.numel()].copy_(values - minus if minus else values)
        done += values.numel()


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
