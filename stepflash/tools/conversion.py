"""One checkpoint in, the same model in another format out; nothing is left half written.

Both directions read pieces of a few MiB and write them at once, so that memory does not grow with the model. A
GGUF is written to a temporary file beside its place, a folder to a temporary folder, and moved when complete.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepflash.chat.checkpoint_files import read_json_object
from stepflash.chat.gguf_vocabulary import vocabulary_files, vocabulary_metadata
from stepflash.errors import ConfigError, WeightsError
from stepflash.gguf_file import write_gguf
from stepflash.weights import gguf_export, safetensors_export
from stepflash.weights.checkpoint import Checkpoint, compare, open_checkpoint, select_mtp
from stepflash.weights.hub import resolve_model
from stepflash.weights.names import expected_tensors, keeps_float32

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_OWN_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Converted:
    """What was written. `notes` are things that the user should know."""

    path: Path
    num_parameters: int
    num_bytes: int
    notes: tuple[str, ...]


def convert(
    model: str | Path,
    out: Path,
    to: str,
    type_name: str = "bf16",
    *,
    keep_mtp: bool = True,
    overwrite: bool = False,
    shard_bytes: int = safetensors_export.SHARD_BYTES,
    on_start: Callable[[int], Advance] = lambda _: lambda _: None,
) -> Converted:
    """Write `model` to `out`.

    Args:
        model: a folder, a .gguf file, a hub id or "nano".
        out: the .gguf file or the folder to write.
        to: "gguf" or "safetensors".
        type_name: of the matrices: a key of `gguf_export.PRESETS`, or of `safetensors_export.TYPES`.
        keep_mtp: with the prediction modules, if there are any.
        overwrite: replace what is at `out`.
        shard_bytes: of safetensors; one tensor is never split.
        on_start: given the number of elements to convert; returns what is called with each number converted.
    Raises:
        WeightsError: the source is incomplete or damaged, `out` is in the way, the disk is too small.
        ConfigError: the format cannot express this model, or `type_name` is not one of its types.
    """
    types = gguf_export.PRESETS if to == "gguf" else safetensors_export.TYPES
    if type_name not in types:
        raise ConfigError(f"{to} has no type {type_name!r}; it has {', '.join(types)}")
    checkpoint = open_checkpoint(resolve_model(model))
    config = select_mtp(checkpoint, None if keep_mtp else False)
    comparison = compare(checkpoint, config)
    if not comparison.fits:
        raise WeightsError(f"{checkpoint.path}: does not fit its configuration: {comparison.describe()}")
    _check_place(checkpoint, out, to, overwrite)
    shapes = expected_tensors(config).values()
    num_parameters = sum(_product(shape) for shape in shapes)
    notes = list(_notes(checkpoint, type_name))

    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "gguf":
        name = Path(str(model)).name.removesuffix(".gguf")
        metadata = gguf_export.model_metadata(config, type_name, name)
        metadata |= vocabulary_metadata(checkpoint.path, config.vocab_size)
        metadata |= gguf_export.norms_to_keep(checkpoint, config)
        tensors = gguf_export.tensors_to_write(checkpoint, config, type_name, on_start(num_parameters))
        num_bytes = gguf_export.num_bytes(tensors)
        _check_space(out.parent, num_bytes)
        write_gguf(out, metadata, tensors)
        notes += _pre_tokenizer_note(checkpoint.path, str(metadata["tokenizer.ggml.pre"]))
    else:
        shards = safetensors_export.plan_shards(checkpoint, config, type_name, shard_bytes)
        num_bytes = sum(tensor.num_bytes for shard in shards for tensor in shard)
        _check_space(out.parent, num_bytes)
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            safetensors_export.write_shards(partial, shards, on_start(num_parameters))
            _write_small_files(checkpoint, partial, type_name, keep_mtp)
            _move_into(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Converted(out, num_parameters, num_bytes, tuple(notes))


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _notes(checkpoint: Checkpoint, type_name: str) -> list[str]:
    """What is lost."""
    found = {tensor.dtype_name for tensor in checkpoint.tensors.values()}
    notes = []
    quantised = sorted(found - {"F32", "BF16", "F16"})
    if quantised and type_name != "f32":
        notes.append(
            f"the source is quantised ({', '.join(quantised)}); its decoded values were rounded again"
        )
    floats = {
        tensor.dtype_name
        for tensor in checkpoint.tensors.values()
        if len(tensor.shape) > 1 and not keeps_float32(tensor.name)
    }
    if type_name == "bf16" and (wider := sorted(floats & {"F32", "F16"})):
        notes.append(f"matrices of {' and '.join(wider)} were rounded to BF16; --type f32 keeps every bit")
    if checkpoint.vision:
        notes.append(f"{len(checkpoint.vision)} tensors of the image tower were left out")
    return notes


def _pre_tokenizer_note(path: Path, name: str) -> list[str]:
    from stepflash.chat.gguf_vocabulary import pre_tokenizer_name
    from stepflash.chat.tokenizer import Tokenizer

    if pre_tokenizer_name(Tokenizer.from_pretrained(path).backend) is not None:
        return []
    return [
        f"llama.cpp knows no pre-tokenizer that cuts text as this model's does; {name} was written, so llama.cpp "
        "may split text into other tokens than stepflash (which reads the exact tokenizer from the file)"
    ]


def _check_place(checkpoint: Checkpoint, out: Path, to: str, overwrite: bool) -> None:
    """Refuse to write over the source, over a thing of another kind, or without leave."""
    if to == "gguf" and (out.is_dir() or out.suffix != ".gguf"):
        raise WeightsError(f"{out}: give the name of a .gguf file to write")
    if to == "safetensors" and (out.is_file() or out.suffix == ".gguf"):
        raise WeightsError(f"{out}: give the name of a folder to write")
    if out.exists():
        if out.samefile(checkpoint.path):
            raise WeightsError(f"{out}: is the model itself; convert to another place")
        if not overwrite and (out.is_file() or any(out.iterdir())):
            raise WeightsError(f"{out}: exists; --overwrite replaces it")


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise WeightsError(
            f"{folder}: {num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; free some space"
        )


def _write_small_files(checkpoint: Checkpoint, folder: Path, type_name: str, keep_mtp: bool) -> None:
    """config.json, tokenizer, template and generation defaults."""
    config = select_mtp(checkpoint, None if keep_mtp else False)
    if checkpoint.kind == "gguf":
        raw = safetensors_export.config_from_model(config, type_name)
        for name, text in vocabulary_files(checkpoint.path).items():
            (folder / name).write_text(text, encoding="utf-8")
    else:
        raw = safetensors_export.edited_config(
            read_json_object(checkpoint.path / "config.json"), config, type_name
        )
        for name in TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        code = sorted(checkpoint.path.glob("*.py"))
        for path in code:
            shutil.copyfile(path, folder / path.name)
        if not code:
            raw.pop("auto_map", None)
    (folder / "config.json").write_text(
        json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _move_into(partial: Path, out: Path) -> None:
    """Put the finished files in place; shards of an earlier conversion go, other files stay."""
    if not out.exists():
        partial.rename(out)
        return
    new = {path.name for path in partial.iterdir()}
    for path in partial.iterdir():
        path.replace(out / path.name)
    for path in out.iterdir():
        if _OWN_SHARD.fullmatch(path.name) and path.name not in new:
            path.unlink()
