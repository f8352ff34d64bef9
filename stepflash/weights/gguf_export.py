"""A checkpoint as the metadata and tensors of a GGUF file that llama.cpp runs (architecture `step35`).

The reverse of `gguf.py`, and streaming: tensors are read, transformed and encoded piece by piece while the file
is written. What a GGUF cannot say is refused, because the metadata is read back and compared with the
configuration. Two things go beyond llama.cpp's own converter: the parameters of the rotary scaling, and those norm
weights whose 1 + w does not give w back (ours to read; llama.cpp ignores keys that it does not know).
Which tensor gets which type follows llama.cpp's `llama-quant.cpp`; so do the keys (`conversion/step3.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepflash.errors import ConfigError
from stepflash.gguf_file import GGML_TYPES, TYPE_IDS, TensorToWrite, TypedValue, tensor_num_bytes
from stepflash.model.config import LayerConfig, ModelConfig
from stepflash.model.rope import inverse_frequencies
from stepflash.weights.checkpoint import Checkpoint
from stepflash.weights.names import EXACT_NORM, ROPE_FREQS, ExpectedTensor, expected, is_norm
from stepflash.weights.quantize_gguf import encode_pieces
from stepflash.weights.stored import StoredTensor, small_pieces

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Preset:
    """A file type of llama.cpp: its number (llama_ftype) and the type of most matrices."""

    file_type: int
    matrix: str


PRESETS = {
    "f32": Preset(0, "F32"),
    "bf16": Preset(32, "BF16"),
    "q8_0": Preset(7, "Q8_0"),
    "q4_k_s": Preset(14, "Q4_K"),
}
_ROUTER = "ffn_gate_inp.weight"
_ROPE_PARAMETERS = ("factor", "low_freq_factor", "high_freq_factor")


def model_metadata(config: ModelConfig, preset: str, name: str) -> dict[str, Any]:
    """`general.*` and `step35.*` of a configuration.

    Raises:
        ConfigError: it has a property that the format cannot express; names the layer.
    """
    layers = config.layers
    full = next((layer for layer in layers if layer.window is None), layers[0])
    sliding = next((layer for layer in layers if layer.window is not None), layers[0])
    keys: dict[str, Any] = {
        "block_count": len(layers),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": TypedValue("i32", [layer.num_heads for layer in layers]),
        "attention.head_count_kv": TypedValue("i32", [layer.num_kv_heads for layer in layers]),
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": sliding.window or 0,
        "attention.sliding_window_pattern": [layer.window is not None for layer in layers],
        "rope.freq_base": float(full.rope.theta),
        "rope.freq_base_swa": float(sliding.rope.theta),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_gating_func": 2,  # sigmoid
        "expert_weights_scale": float(config.router_scaling_factor),
        "expert_weights_norm": True,
        "leading_dense_block_count": next((i for i, layer in enumerate(layers) if layer.is_moe), len(layers)),
        "moe_every_n_layers": 1,
        "swiglu_clamp_exp": [float(layer.swiglu_limit or 0) for layer in layers],
        "swiglu_clamp_shexp": [float(layer.shared_swiglu_limit or 0) for layer in layers],
        **_rope_scaling(full),
    }
    if config.num_mtp_layers:
        keys["nextn_predict_layers"] = config.num_mtp_layers
    metadata = {
        "general.architecture": "step35",
        "general.type": "model",
        "general.name": name,
        "general.file_type": PRESETS[preset].file_type,
        **({"general.quantization_version": 2} if preset.startswith("q") else {}),
        **{f"step35.{key}": value for key, value in keys.items()},
    }
    _check_read_back(config, metadata)
    return metadata


def _rope_scaling(full: LayerConfig) -> dict[str, Any]:
    """The parameters for stepflash, and type "none" for llama.cpp: the divisors in `rope_freqs` are all it needs.

    Without the type llama.cpp would take `factor` for a linear scaling and apply it a second time.
    """
    scaling = full.rope.scaling
    if scaling is None:
        return {"rope.scaling.type": "none", "rope.scaling.factor": 1.0}
    parameters = {f"rope.scaling.{name}": float(getattr(scaling, name)) for name in _ROPE_PARAMETERS}
    original = scaling.original_max_position_embeddings
    return {"rope.scaling.type": "none", "rope.scaling.original_context_length": original, **parameters}


def _check_read_back(config: ModelConfig, metadata: Mapping[str, Any]) -> None:
    """Refuse what does not survive, such as an expert layer among dense ones or a third kind of attention."""
    plain = {key: value.value if isinstance(value, TypedValue) else value for key, value in metadata.items()}
    found = ModelConfig.from_gguf(plain)
    for i, (ours, theirs) in enumerate(zip(config.layers, found.layers, strict=True)):
        if ours != theirs:
            raise ConfigError(
                f"layer {i} cannot be described by a GGUF: it is {ours}, a GGUF could say {theirs}"
            )
    found = replace(found, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
    if found != config:
        raise ConfigError(
            f"the configuration cannot be described by a GGUF: it is {config}, read back {found}"
        )


def rotary_divisors(config: ModelConfig) -> Tensor | None:
    """The table that llama.cpp divides the frequencies of full-attention layers by: float32 [head_dim / 2].

    Its graph uses as many entries as a full layer turns pairs, rotary_dim / 2; the rest of the table, which it
    wants all the same, is 1. None without scaling.
    """
    scaled = next((layer for layer in config.layers if layer.rope.scaling is not None), None)
    if scaled is None:
        return None
    table = torch.ones(scaled.head_dim // 2)
    ratio = inverse_frequencies(replace(scaled.rope, scaling=None)) / inverse_frequencies(scaled.rope)
    table[: len(ratio)] = ratio
    return table


def norms_to_keep(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, TypedValue]:
    """Metadata for the norms that a GGUF would round."""
    kept: dict[str, TypedValue] = {}
    for row in expected(config):
        if is_norm(row.released):
            exact = torch.empty(row.shape)
            checkpoint.tensors[row.released].fill(exact)
            kept |= norm_to_keep(row, exact) or {}
    return kept


def norm_to_keep(row: ExpectedTensor, exact: Tensor) -> dict[str, TypedValue] | None:
    """The whole norm as metadata if (1 + w) - 1 in float32 is not w, bit for bit; else None.

    For a bf16 w that happens below 2^-16, and to -0; for a float32 w almost always.
    """
    returned = (exact + 1.0) - 1.0
    if torch.equal(returned.view(torch.int32), exact.view(torch.int32)):
        return None
    return {EXACT_NORM + row.gguf: TypedValue("f32", exact.tolist())}


def tensor_types(config: ModelConfig, preset: str) -> dict[str, str]:
    """GGUF name -> type, as llama.cpp's quantiser chooses.

    Norms, biases and the router stay float32. In Q4_K_S the output is Q6_K, and the first four `attn_v` and the
    `ffn_down` of the first eighth of the blocks are Q5_K. Models of exactly 8 experts have a rule of their own there
    (made for Mixtral). A row that is not whole blocks of 256 becomes Q8_0, where llama.cpp takes a 5-bit type.
    """
    return {row.gguf: _tensor_type(row, config, preset) for row in expected(config)}


def _tensor_type(row: ExpectedTensor, config: ModelConfig, preset: str) -> str:
    matrix = PRESETS[preset].matrix
    if len(row.shape) == 1 or row.gguf.endswith(_ROUTER):
        return "F32"
    wanted = _mixture(row.gguf, config) if preset == "q4_k_s" else matrix
    columns = row.shape[-1]
    if columns % GGML_TYPES[TYPE_IDS[wanted]].block_size == 0:
        return wanted
    return "Q8_0" if columns % 32 == 0 else "F16"


def _mixture(gguf_name: str, config: ModelConfig) -> str:
    """Type of a matrix in Q4_K_S."""
    if gguf_name == "output.weight":
        return "Q6_K"
    _, _, below = gguf_name.partition("blk.")
    block, _, kind = below.partition(".")
    if config.num_experts == 8 and kind in ("attn_v.weight", "attn_k.weight"):
        return "Q8_0"
    if config.num_experts == 8 and kind == "attn_output.weight":
        return "Q5_K"
    if kind == "attn_v.weight" and int(block) < 4:
        return "Q5_K"
    if kind.startswith("ffn_down") and int(block) < len(config.layers) // 8:
        return "Q5_K"
    return "Q4_K"


def tensors_to_write(
    checkpoint: Checkpoint, config: ModelConfig, preset: str, advance: Advance = lambda _: None
) -> dict[str, TensorToWrite]:
    """Every tensor of the file; values are read when `write_gguf` asks for them.

    Args:
        advance: called with the number of elements whenever some have been read.
    """
    types = tensor_types(config, preset)
    tensors = {}
    for row in expected(config):
        stored = checkpoint.tensors[row.released]
        chunks = _chunks(stored, is_norm(row.released), types[row.gguf], advance)
        tensors[row.gguf] = TensorToWrite(row.shape[::-1], types[row.gguf], chunks)
    divisors = rotary_divisors(config)
    if divisors is not None:
        tensors[ROPE_FREQS] = TensorToWrite((len(divisors),), "F32", [divisors.numpy().tobytes()])
    return tensors


def num_bytes(tensors: Mapping[str, TensorToWrite]) -> int:
    """Bytes of all tensor data."""
    return sum(tensor_num_bytes(t.shape, GGML_TYPES[TYPE_IDS[t.type_name]]) for t in tensors.values())


def _chunks(stored: StoredTensor, is_norm: bool, type_name: str, advance: Advance) -> Iterator[bytes]:
    for piece in encode_pieces(_pieces(stored, is_norm, advance), type_name):
        yield piece.numpy().tobytes()


def _pieces(stored: StoredTensor, is_norm: bool, advance: Advance) -> Iterator[Tensor]:
    for piece in small_pieces(stored):
        yield piece.float() + 1.0 if is_norm else piece
        advance(piece.numel())
