"""`stepflash quantize`: a checkpoint in a format of the CPU kernels, written tensor by tensor.

Which tensor goes where is planned from headers alone, so every shard is a fixed sequence of bytes: the output does
not depend on memory, interruptions or resuming. A shard counts once it is complete, renamed into place and entered
in the manifest; no more than a few dozen MiB of weights are in memory. The receipt (`stepflash.tools.receipt`) is
written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepflash.errors import ConfigError, WeightsError
from stepflash.kernels.formats import Format, packed_bytes, parse_format, unpack
from stepflash.model.config import ModelConfig
from stepflash.tools.calibrate import Calibration
from stepflash.tools.receipt import MANIFEST_NAME
from stepflash.weights.checkpoint import Checkpoint, compare, select_mtp
from stepflash.weights.names import expected_tensors, keeps_float32, layer_of
from stepflash.weights.packed import (
    QUANT_METHOD,
    VERSION,
    content_digest,
    format_of,
    hashed,
    is_packable,
    match,
    num_packed_bytes,
    pack_slab,
    packed_name,
    slabs,
)
from stepflash.weights.safetensors import DTYPE_BYTES, INDEX_NAME, PLAIN_DTYPES, read_header
from stepflash.weights.stored import StoredTensor

SHARD_BYTES = 1 << 30
ALIGNMENT = 64  # of the data in a file: a cache line; packed tensors are multiples of it
NONE = "none"  # instead of a format: no rule
EDGE = "int8"  # of the layers at both ends, unless asked otherwise; the planner counts with the same
NEAREST, GPTQ = "nearest", "gptq"
STATE_NAME = "stepflash-calibration-{:05d}.safetensors"  # activations before a layer, while unfinished
COPIED = ("*.json", "*.jinja", "*.txt", "LICENSE*", "README*")

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Formats as data: `rules` are (shell pattern over released names, format), the first match wins.

    `rounding` of int4 weights in the trunk: "nearest" from the weights alone, "gptq" from calibration tokens, whose
    digest and origin are then in `calibration`.
    """

    format: str
    rules: tuple[tuple[str, str], ...] = ()
    rounding: str = NEAREST
    calibration: str = ""

    def format_name(self, released: str) -> str:
        return match(self.rules, released, self.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One tensor of the output; `fmt` None is a float tensor that is copied."""

    stored: StoredTensor
    name: str
    fmt: Format | None
    dtype_name: str
    shape: tuple[int, ...]
    num_bytes: int


def edge_layers(num_layers: int) -> tuple[int, ...]:
    """The layers at both ends that quantise badly: 0-4, 43 and 44 of the released 45, the same share of others.

    The released model gave broken output, even with 8 bits, until these were left alone (intel/auto-round#1624);
    the last two are those whose activations are so large that they are clamped.
    """
    first, last = math.ceil(num_layers / 9), math.ceil(2 * num_layers / 45)
    return (*range(first), *range(max(num_layers - last, first), num_layers))


def make_recipe(
    config: ModelConfig, format_name: str, protect: Sequence[tuple[str, str]] = (), edge: str = EDGE
) -> Recipe:
    """The recipe of a format: `protect` first, then what is protected by default.

    By default the edge layers stay in `edge` ("none" treats them as all others), head gates in bf16, LM head
    and prediction modules in int8: an error there costs accepted drafts, never a wrong token. A default that would
    be worse than the format itself is left out. Embedding, norms and router are never quantised.

    Raises:
        ConfigError: an unknown format.
    """
    defaults = [("*.g_proj.weight", "bf16")]
    defaults += [
        (f"model.layers.{layer}.*", edge) for layer in edge_layers(config.num_layers) if edge != NONE
    ]
    first_mtp = config.num_layers
    defaults += [(f"model.layers.{first_mtp + k}.*", "int8") for k in range(config.num_mtp_layers)]
    defaults.append(("lm_head.weight", "int8"))
    bits = _bits(format_name)
    kept = [(pattern, name) for pattern, name in defaults if _bits(name) > bits]
    for _, name in protect:
        _bits(name)
    return Recipe(format=format_name.replace("-", "_"), rules=(*protect, *kept))


def _bits(format_name: str) -> float:
    try:
        return parse_format(format_name, 1024).bits_per_weight
    except ValueError as error:
        raise ConfigError(str(error)) from error


# ---- plan ---------------------------------------------------------------------------------------------------


def plan_tensors(checkpoint: Checkpoint, recipe: Recipe) -> list[Planned]:
    """What the output holds, in the order of a forward pass; from headers alone.

    Raises:
        WeightsError, ConfigError: the source is incomplete or of a kind that is not quantised here, or a rule is
            unusable.
    """
    if checkpoint.kind != "safetensors" or any(t.packed for t in checkpoint.tensors.values() if _is_ours(t)):
        raise WeightsError(
            f"{checkpoint.path}: is already quantised; quantise from the safetensors it was made from"
        )
    config = select_mtp(checkpoint, None)
    comparison = compare(checkpoint, config)
    if not comparison.fits:
        raise WeightsError(f"{checkpoint.path}: does not fit its configuration: {comparison.describe()}")
    planned = [_planned(checkpoint.tensors[name], recipe) for name in expected_tensors(config)]
    formats = {tensor.stored.name: tensor.fmt for tensor in planned}
    for name, fmt in formats.items():
        up = name.replace("gate_proj", "up_proj")
        if formats[up] != fmt:
            raise ConfigError(f"{name} and {up} run as one and must have one format; protect both or neither")
    packable = [tensor.stored.name for tensor in planned if tensor.fmt is not None]
    for pattern, _ in recipe.rules:
        if not any(match([(pattern, "x")], name, "") for name in packable):
            raise ConfigError(f"the pattern {pattern!r} matches no weight that can be quantised")
    return planned


def _is_ours(stored: StoredTensor) -> bool:
    return stored.packed is not None and stored.dtype_name == stored.packed.fmt.name


def _planned(stored: StoredTensor, recipe: Recipe) -> Planned:
    if is_packable(stored.name):
        fmt = format_of(stored, recipe.format_name(stored.name))
        num_bytes = num_packed_bytes(stored.shape, fmt)
        shape = (*stored.shape[:-2], num_bytes // math.prod(stored.shape[:-2]))
        return Planned(
            stored=stored,
            name=packed_name(stored.name),
            fmt=fmt,
            dtype_name="U8",
            shape=shape,
            num_bytes=num_bytes,
        )
    dtype_name = stored.dtype_name
    if dtype_name not in PLAIN_DTYPES:
        dtype_name = "F32" if keeps_float32(stored.name) else "BF16"
    num_bytes = math.prod(stored.shape) * DTYPE_BYTES[dtype_name]
    return Planned(
        stored=stored,
        name=stored.name,
        fmt=None,
        dtype_name=dtype_name,
        shape=stored.shape,
        num_bytes=num_bytes,
    )


def plan_shards(
    planned: Sequence[Planned], shard_bytes: int = SHARD_BYTES, by_layer: bool = False
) -> dict[str, list[Planned]]:
    """File name -> its tensors: in order, a new file before one would exceed `shard_bytes`, or for each layer."""
    groups: list[list[Planned]] = [[]]
    for tensor in planned:
        if groups[-1] and (
            layer_of(groups[-1][-1].stored.name) != layer_of(tensor.stored.name)
            if by_layer
            else sum(t.num_bytes for t in groups[-1]) + tensor.num_bytes > shard_bytes
        ):
            groups.append([])
        groups[-1].append(tensor)
    # Packed tensors come first in a file: their sizes keep the next one aligned.
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": sorted(
            group, key=lambda tensor: tensor.fmt is None
        )
        for i, group in enumerate(groups, 1)
    }


def plan_digest(shards: Mapping[str, Sequence[Planned]], calibration: str = "") -> str:
    """What two runs must share for the second to go on where the first stopped."""
    rows = [
        (file, t.name, t.dtype_name, t.shape, t.fmt, t.stored.origin, t.stored.dtype_name, t.stored.num_bytes)
        for file, tensors in shards.items()
        for t in tensors
    ]
    return hashlib.sha256(json.dumps([calibration, *rows]).encode()).hexdigest()


# ---- writing ------------------------------------------------------------------------------------------------


def quantize_checkpoint(
    source: Checkpoint,
    out: Path,
    recipe: Recipe,
    *,
    token_ids: Sequence[Tensor] = (),
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Write the quantised checkpoint, without its receipt; goes on where an interrupted run of the same stopped.

    Args:
        token_ids: the calibration documents, [num_tokens] int64 each, if the recipe's rounding needs them.
        on_progress: called with the bytes of the source done and in all.
    Returns:
        for each released name: sha256 of what was written, source_sha256 of what was read, format, and the
        relative error ||w - w'|| / ||w|| of a quantised weight.
    Raises:
        WeightsError, ConfigError: nothing can be quantised, `out` holds something else, or the disk is too small.
    """
    planned = plan_tensors(source, recipe)
    calibration = None
    if recipe.rounding == GPTQ:
        formats = {tensor.stored.name: tensor.fmt for tensor in planned}
        calibration = Calibration(source, select_mtp(source, None), formats, token_ids)
    shards = plan_shards(planned, shard_bytes, by_layer=calibration is not None)
    digest = plan_digest(shards, "" if calibration is None else calibration.digest)
    done = _start(out, digest)
    need = sum(t.num_bytes for file, tensors in shards.items() if file not in done for t in tensors)
    free = shutil.disk_usage(out).free
    if need > free:
        raise WeightsError(f"{out}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    if calibration is not None:
        done = _restore(out, calibration, shards, done)
    total = sum(t.stored.num_bytes for tensors in shards.values() for t in tensors)
    num_done = 0
    for file, tensors in shards.items():
        if file not in done:
            start = num_done
            rounded: Mapping[str, Tensor] = {}
            if calibration is not None and layer_of(tensors[0].stored.name) == calibration.next_layer:
                rounded = calibration.round_layer()
            entries = _write_shard(
                out / file,
                tensors,
                rounded,
                lambda n, start=start: on_progress(start + n, total),  # type: ignore[misc]
            )
            if rounded and calibration is not None:
                _save(out, calibration)
            done[file] = entries
            _write_json(out / MANIFEST_NAME, {"plan": digest, "shards": done})
        num_done += sum(t.stored.num_bytes for t in tensors)
        on_progress(num_done, total)
    _finish(source, out, shards)
    for path in out.glob(STATE_NAME.format(0).replace("00000", "*")):
        path.unlink()
    return {name: entry for entries in done.values() for name, entry in entries.items()}


def _save(out: Path, calibration: Calibration) -> None:
    """The activations for the next layer; those of the layer before go once the new ones are whole."""
    assert calibration.hidden is not None
    path = out / STATE_NAME.format(calibration.next_layer)
    part = path.with_name(path.name + ".part")
    save_file({"hidden": calibration.hidden}, part)
    part.replace(path)
    # The manifest may still count one layer less.
    (out / STATE_NAME.format(calibration.next_layer - 2)).unlink(missing_ok=True)


def _restore(
    out: Path,
    calibration: Calibration,
    shards: Mapping[str, Sequence[Planned]],
    done: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Put the calibration before the first layer that is not done; what is done from there on."""
    num_layers = calibration.config.num_layers
    layers = {file: layer_of(tensors[0].stored.name) for file, tensors in shards.items()}
    missing = [layer for file, layer in layers.items() if file not in done and layer is not None]
    first = min([layer for layer in missing if layer < num_layers], default=num_layers)
    if first == num_layers:
        calibration.next_layer = num_layers
        return done
    path = out / STATE_NAME.format(first)
    if first and path.is_file():
        calibration.next_layer, calibration.hidden = first, load_file(path)["hidden"]
    # Later layers were rounded for the inputs that this run makes again; without a state all of them are.
    begin = calibration.next_layer
    return {
        file: entries
        for file, entries in done.items()
        if (layer := layers[file]) is None or layer < begin or layer >= num_layers
    }


def _start(out: Path, digest: str) -> dict[str, dict[str, Any]]:
    """Shards that an interrupted run has finished, each checked against its digests; an empty folder if none."""
    manifest = out / MANIFEST_NAME
    if not manifest.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out}: exists already and is not empty; give a new folder")
        out.mkdir(parents=True, exist_ok=True)
        _write_json(manifest, {"plan": digest, "shards": {}})
        return {}
    try:
        values = json.loads(manifest.read_bytes())
        begun, shards = values["plan"], dict(values["shards"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{manifest}: nothing to go on with: {error}; use a new folder") from error
    if begun != digest:
        raise ConfigError(f"{out}: was begun with another source or recipe; use a new folder")
    for part in out.glob("*.part"):
        part.unlink()
    return {file: entries for file, entries in shards.items() if _is_whole(out / file, entries)}


def _is_whole(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a finished file still holds what was written."""
    try:
        found = read_header(path)
        digests = {e.name: content_digest(e.file.chunks(e.offset, e.num_bytes, 1)) for e in found}
    except WeightsError:
        return False
    return digests == {
        packed_name(name) if packed_name(name) in digests else name: entry["sha256"]
        for name, entry in entries.items()
    }


def _write_shard(
    path: Path,
    tensors: Sequence[Planned],
    rounded: Mapping[str, Tensor],
    on_bytes: Callable[[int], None],
) -> dict[str, Any]:
    """Write one file under a temporary name, then put it into place whole.

    Args:
        rounded: packed bytes by released name of the tensors that are rounded already.
    """
    part = path.with_name(path.name + ".part")
    entries: dict[str, Any] = {}
    done = 0
    with part.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            entries[tensor.stored.name] = _write_tensor(file, tensor, rounded.get(tensor.stored.name))
            done += tensor.stored.num_bytes
            on_bytes(done)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return entries


def _header(tensors: Sequence[Planned]) -> bytes:
    """Length and JSON of a safetensors file, padded with spaces so that the data is aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype_name,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: IO[bytes], tensor: Planned, rounded: Tensor | None) -> dict[str, Any]:
    """Write one tensor; what the receipt says about it."""
    written, read, error = hashlib.sha256(), hashlib.sha256(), SquaredError()
    source = replace(tensor.stored, values=lambda: hashed(tensor.stored.values(), read))
    num_bytes = 0
    for piece in hashed(_pieces(tensor, source, rounded, error), written):
        num_bytes += file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
    assert num_bytes == tensor.num_bytes, f"{tensor.name}: {num_bytes} bytes, planned {tensor.num_bytes}"
    entry: dict[str, Any] = {"sha256": written.hexdigest(), "source_sha256": read.hexdigest()}
    if tensor.fmt is None:
        return entry | {"format": tensor.dtype_name.lower()}
    return entry | {"format": tensor.fmt.name.lower(), "error": round(error.relative, 6)}


def _pieces(
    tensor: Planned, source: StoredTensor, rounded: Tensor | None, error: SquaredError
) -> Iterator[Tensor]:
    if tensor.fmt is None:
        for piece in source.values():
            yield piece.to(PLAIN_DTYPES[tensor.dtype_name])
        return
    done = 0
    for slab in slabs(source):
        if rounded is None:
            packed = pack_slab(source, slab, tensor.fmt)
        else:
            num_bytes = packed_bytes(tensor.fmt, *slab.shape)
            packed = rounded.view(-1)[done : done + num_bytes]
            done += num_bytes
        error.add(slab, unpack(packed, tensor.fmt, *slab.shape))
        yield packed


class SquaredError:
    """||w - w'|| / ||w|| of a matrix that comes in pieces."""

    def __init__(self) -> None:
        self.error = self.norm = 0.0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        self.error += float((exact - rounded).square_().sum(dtype=torch.float64))
        self.norm += float(exact.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def _finish(source: Checkpoint, out: Path, shards: Mapping[str, Sequence[Planned]]) -> None:
    """Index, config.json and the files beside the weights."""
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    num_bytes = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
    _write_json(out / INDEX_NAME, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    config = json.loads((source.path / "config.json").read_bytes())
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    packed = [t for tensors in shards.values() for t in tensors if t.fmt is not None]
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "tensors": {
            t.stored.name: {"format": t.fmt.name.lower(), "shape": t.stored.shape}
            for t in packed
            if t.fmt is not None
        },
    }
    _write_json(out / "config.json", config)
    for pattern in COPIED:
        for path in source.path.glob(pattern):
            # What is there already describes the new weights; other receipts and indices the old ones.
            if (
                path.is_file()
                and not path.name.endswith(".index.json")
                and not path.name.startswith("stepflash-")
            ) and not (out / path.name).exists():
                shutil.copyfile(path, out / path.name)


def _write_json(path: Path, values: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
