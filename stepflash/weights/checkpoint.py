"""A checkpoint opened: its configuration and every parameter where it lies, whatever the format.

Opening reads headers only. `compare` sets the tensors found against those that the configuration needs; loading,
inspecting and verifying all start from its answer, so they cannot disagree about what fits.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepflash.errors import ConfigError, WeightsError
from stepflash.gguf_file import read_gguf
from stepflash.model.config import ModelConfig
from stepflash.weights import gguf as gguf_format
from stepflash.weights import safetensors as safetensors_format
from stepflash.weights.names import expected_tensors, layer_of
from stepflash.weights.stored import StoredTensor, shortened


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Headers of a checkpoint.

    Attributes:
        tensors: parameters by released name.
        unexpected: names, as in the files, that no parameter of any layer bears.
        vision: names of a wrapper's image tower, which the text model does not use.
        rope_freqs: rotary divisors of a GGUF.
    """

    path: Path
    kind: str  # "safetensors" or "gguf"
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    unexpected: list[str] = field(default_factory=list)
    vision: list[str] = field(default_factory=list)
    rope_freqs: StoredTensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Comparison:
    """What keeps a checkpoint from fitting a configuration: all empty when it fits."""

    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, expected, found

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def describe(self) -> str:
        """Both sides in one line, long lists shortened."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} tensors missing: {shortened(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected: {shortened(self.unexpected)}")
        if self.wrong_shape:
            shapes = [
                f"{name} is {list(found)}, expected {list(needed)}"
                for name, needed, found in self.wrong_shape
            ]
            parts.append(f"{len(shapes)} of a wrong shape: {shortened(shapes, 3)}")
        return "; ".join(parts)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder of safetensors or a .gguf file.

    Raises:
        WeightsError: absent, damaged, or stored in a way that stepflash does not read.
        ConfigError: its configuration is wrong or not supported.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".gguf":
        gguf = read_gguf(path)
        config = ModelConfig.from_gguf(gguf.metadata)
        found = gguf_format.read_tensors(gguf, config)
        return Checkpoint(
            path=path,
            kind="gguf",
            config=config,
            tensors=found.tensors,
            unexpected=found.unexpected,
            rope_freqs=found.rope_freqs,
        )
    raise WeightsError(f"{path}: neither a folder with safetensors nor a .gguf file")


def _open_folder(path: Path) -> Checkpoint:
    config = ModelConfig.from_pretrained(path)
    try:
        raw_config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path / 'config.json'}: cannot read: {error}") from error
    found = safetensors_format.read_folder(path, raw_config)
    known = expected_tensors(config)
    return Checkpoint(
        path=path,
        kind="safetensors",
        config=config,
        tensors={name: tensor for name, tensor in found.tensors.items() if name in known},
        unexpected=[t.origin for name, t in found.tensors.items() if name not in known] + found.unexpected,
        vision=found.vision,
    )


def is_packed(checkpoint: Checkpoint) -> bool:
    """True for the output of `stepflash quantize`: a folder with weights that only stepflash can read."""
    return checkpoint.kind == "safetensors" and any(
        tensor.packed is not None and tensor.dtype_name == tensor.packed.fmt.name
        for tensor in checkpoint.tensors.values()
    )


def compare(checkpoint: Checkpoint, config: ModelConfig) -> Comparison:
    """Missing, unexpected and misshapen tensors for `config`, which may have fewer MTP modules than the file."""
    expected = expected_tensors(config)
    tensors = checkpoint.tensors
    return Comparison(
        missing=[name for name in expected if name not in tensors],
        unexpected=list(checkpoint.unexpected),
        wrong_shape=[
            (name, shape, tensors[name].shape)
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    )


def num_stored_mtp_modules(checkpoint: Checkpoint) -> int:
    """How many MTP modules have at least one tensor in the files, counted up to the last such module."""
    first = checkpoint.config.num_layers
    layers = [layer for name in checkpoint.tensors if (layer := layer_of(name)) is not None]
    return max((layer - first + 1 for layer in layers), default=0) if layers and max(layers) >= first else 0


def select_mtp(checkpoint: Checkpoint, mtp: bool | None) -> ModelConfig:
    """The configuration to load: with MTP modules (True), without (False), or with those that are there (None).

    Raises:
        WeightsError: they are asked for and the checkpoint has none.
    """
    stored = num_stored_mtp_modules(checkpoint)
    if mtp and not stored:
        raise WeightsError(f"{checkpoint.path}: has no MTP modules; load it with mtp=None or mtp=False")
    return with_mtp_modules(checkpoint.config, 0 if mtp is False else stored)


def with_mtp_modules(config: ModelConfig, num_modules: int) -> ModelConfig:
    """`config` with only its first `num_modules` MTP modules."""
    return replace(
        config, num_mtp_layers=num_modules, layers=config.layers[: config.num_layers + num_modules]
    )
