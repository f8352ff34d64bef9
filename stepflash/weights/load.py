"""A checkpoint becomes a network.

The network is built without memory (meta device) and its parameters are put in one by one, in the order of the
layers, so that no more than the result and a few MiB exist at any time. Nothing may be left over on either side.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor, nn

from stepflash.errors import WeightsError
from stepflash.model.config import ModelConfig
from stepflash.model.rope import inverse_frequencies
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.checkpoint import Checkpoint, compare, is_packed, open_checkpoint, select_mtp
from stepflash.weights.gguf import rotary_divisors
from stepflash.weights.hub import resolve_model
from stepflash.weights.names import expected_tensors, keeps_float32
from stepflash.weights.packed import PLAIN, STORED, StoredPacker, draft_formats, is_packable
from stepflash.weights.quantized import DEFAULT_PROTECT, pack_network
from stepflash.weights.receipt import checked_receipt
from stepflash.weights.stored import StoredTensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    *,
    mtp: bool | None = None,
    rope_freqs: str = "recompute",
    progress: bool = True,
    revision: str | None = None,
    memory_map: bool = True,
    quantization: str | None = None,
    protect: Mapping[str, str] | None = None,
    draft_format: str | None = None,
) -> Step3p5ForCausalLM:
    """Load a model of this architecture.

    Norms and router are float32 whatever `dtype` is (they decide more than their size); everything else has
    `dtype`. FP8 and GGUF weights are decoded, unless `quantization` says otherwise.

    Args:
        path: a folder, a .gguf file, a hub id or "nano"; see `resolve_model`.
        dtype: "bfloat16", "float16" or "float32".
        mtp: the prediction modules: required (True), left out (False), taken if present (None).
        rope_freqs: "recompute" the rotary frequencies, or take the divisors of the "file", as llama.cpp does
            (GGUF only; see docs on why the two differ).
        progress: show a progress bar if stderr is a terminal.
        revision: of a hub id.
        memory_map: on the CPU, let tensors that are already stored in `dtype` be the mapped file itself: the
            load is instant and processes share the memory. The file must then not be changed in place while
            the model lives (replacing it is fine). False copies everything. Packed weights are always copied,
            into huge pages, from which they stream faster.
        quantization: a weight format ("int8", "int4_g64", "fp8", "bf16", ...; `formats.parse_format`) to pack
            the matrices in for the kernels, one at a time; "stored" packs each as the checkpoint has it (FP8,
            Q8_0, Q4_K and Q6_K grow by nothing); "plain" decodes everything into a network that can also be
            trained. Weights for a GPU are packed in host memory, one at a time. None is "stored" for a checkpoint
            of `stepflash quantize` and "plain" for all others.
        protect: patterns of released names to formats, see `quantize_model`; None keeps the head gates in bf16.
        draft_format: of the prediction modules' matrices that are stored as plain floats, head gates excepted;
            where weights are packed and `protect` says nothing else.
    Raises:
        WeightsError: anything absent, damaged, left over, of a wrong shape, or not what its receipt says.
        ConfigError: the configuration or the quantisation is wrong or not supported.
    """
    target = _dtype(dtype)
    if rope_freqs not in ("recompute", "file"):
        raise ValueError(f'rope_freqs is {rope_freqs!r}; it must be "recompute" or "file"')
    checkpoint = open_checkpoint(resolve_model(path, revision))
    config = select_mtp(checkpoint, mtp)
    comparison = compare(checkpoint, config)
    if not comparison.fits:
        raise WeightsError(f"{checkpoint.path}: does not fit its configuration: {comparison.describe()}")

    receipt = checked_receipt(checkpoint)
    if quantization is None:
        quantization = STORED if is_packed(checkpoint) else PLAIN
    packed_device, device = device, "cpu" if quantization != PLAIN else device  # packed here, then moved

    model = empty_model(config)
    names = list(expected_tensors(config))
    if quantization != PLAIN:
        names = [name for name in names if not is_packable(name)]
    with _progress_bar(progress) as bar:
        task = bar.add_task(
            "loading", total=sum(checkpoint.tensors[name].num_bytes for name in expected_tensors(config))
        )
        for name in names:
            stored = checkpoint.tensors[name]
            if receipt is not None:
                receipt.check(stored)
            wanted = torch.float32 if keeps_float32(name) else target
            put(model, name, materialize(stored, wanted, device, memory_map))
            bar.advance(task, stored.num_bytes)
        if quantization != PLAIN:
            rules = DEFAULT_PROTECT if protect is None and quantization != STORED else protect or {}
            if draft_format is not None:
                drafts = draft_formats(checkpoint.tensors, config.num_layers, draft_format)
                rules = {**rules, **drafts, **rules}  # the first match wins
            packer = StoredPacker(
                checkpoint.tensors,
                quantization,
                rules,
                on_pieces=receipt.checked if receipt is not None else None,
                on_done=lambda stored: bar.advance(task, stored.num_bytes),
                device=packed_device,
            )
            pack_network(model, packer)
            if protect is not None:
                packer.refuse_unused()
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not unfilled, f"names.py and the network disagree: {unfilled}"
    if rope_freqs == "file":
        _use_stored_rotary(model, checkpoint)
    return model.eval().to(packed_device)


def empty_model(config: ModelConfig) -> Step3p5ForCausalLM:
    """The network with every parameter on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return Step3p5ForCausalLM(config)


def materialize(
    stored: StoredTensor, dtype: torch.dtype, device: str | torch.device = "cpu", memory_map: bool = False
) -> Tensor:
    """Read one tensor; the only memory taken besides the result is a buffer of a few MiB."""
    if (
        memory_map
        and stored.view is not None
        and stored.view_dtype == dtype
        and torch.device(device).type == "cpu"
    ):
        return stored.view()
    out = torch.empty(stored.shape, dtype=dtype)
    stored.fill(out)
    return out.to(device)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by this tensor itself: no copy, and the parameter's dtype becomes the tensor's."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module.get_parameter(attribute)
    module.register_parameter(attribute, nn.Parameter(tensor, requires_grad=old.requires_grad))


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return found


def _progress_bar(wanted: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (wanted and sys.stderr.isatty()),
    )


def _use_stored_rotary(model: Step3p5ForCausalLM, checkpoint: Checkpoint) -> None:
    """Divide the unscaled frequencies of the scaled layers by the file's table, as llama.cpp's graph does."""
    if checkpoint.rope_freqs is None:
        raise WeightsError(
            f'{checkpoint.path}: has no rope_freqs tensor; load it with rope_freqs="recompute"'
        )
    divisors = rotary_divisors(checkpoint.rope_freqs)
    for rope in model.rope_frequencies:
        if rope.scaling is None:
            continue
        half = rope.rotary_dim // 2
        if divisors.numel() < half:
            raise WeightsError(
                f"{checkpoint.path}: rope_freqs has {divisors.numel()} entries, {half} are needed"
            )
        model.rope_frequencies[rope] = inverse_frequencies(replace(rope, scaling=None)) / divisors[:half]
