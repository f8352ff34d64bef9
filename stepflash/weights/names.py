"""Every tensor of a checkpoint as data: released name, GGUF name, shape; and how other spellings map to them.

One table row per parameter gives both names and the shape in symbols; a `ModelConfig` turns rows into numbers.
Nothing here looks at torch modules, so that the network, the loader and the files are checked against each
other. Sources: spec 5.1 (safetensors), 6.2 and 6.3 (GGUF), 9.13 (a tensor that no rule covers must be an error).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from stepflash.model.config import LayerConfig, ModelConfig

Shape = tuple[int, ...]


class Row(NamedTuple):
    """A parameter: its name below the layer (or the model), its GGUF name, its row-major shape in symbols."""

    released: str
    gguf: str
    dims: tuple[str, ...]


TOP = (
    Row("model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
    Row("model.norm.weight", "output_norm.weight", ("hidden",)),
    Row("lm_head.weight", "output.weight", ("vocab", "hidden")),
)
ATTENTION = (
    Row("input_layernorm.weight", "attn_norm.weight", ("hidden",)),
    Row("self_attn.q_proj.weight", "attn_q.weight", ("q", "hidden")),
    Row("self_attn.k_proj.weight", "attn_k.weight", ("kv", "hidden")),
    Row("self_attn.v_proj.weight", "attn_v.weight", ("kv", "hidden")),
    Row("self_attn.g_proj.weight", "attn_gate.weight", ("heads", "hidden")),
    Row("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "q")),
    Row("self_attn.q_norm.weight", "attn_q_norm.weight", ("head_dim",)),
    Row("self_attn.k_norm.weight", "attn_k_norm.weight", ("head_dim",)),
    Row("post_attention_layernorm.weight", "ffn_norm.weight", ("hidden",)),
)
DENSE = (
    Row("mlp.gate_proj.weight", "ffn_gate.weight", ("inter", "hidden")),
    Row("mlp.up_proj.weight", "ffn_up.weight", ("inter", "hidden")),
    Row("mlp.down_proj.weight", "ffn_down.weight", ("hidden", "inter")),
)
MOE = (
    Row("moe.gate.weight", "ffn_gate_inp.weight", ("experts", "hidden")),
    Row("moe.router_bias", "exp_probs_b.bias", ("experts",)),
    Row("moe.gate_proj.weight", "ffn_gate_exps.weight", ("experts", "expert_inter", "hidden")),
    Row("moe.up_proj.weight", "ffn_up_exps.weight", ("experts", "expert_inter", "hidden")),
    Row("moe.down_proj.weight", "ffn_down_exps.weight", ("experts", "hidden", "expert_inter")),
    Row("share_expert.gate_proj.weight", "ffn_gate_shexp.weight", ("shared_inter", "hidden")),
    Row("share_expert.up_proj.weight", "ffn_up_shexp.weight", ("shared_inter", "hidden")),
    Row("share_expert.down_proj.weight", "ffn_down_shexp.weight", ("hidden", "shared_inter")),
)
MTP = (
    Row("enorm.weight", "nextn.enorm.weight", ("hidden",)),
    Row("hnorm.weight", "nextn.hnorm.weight", ("hidden",)),
    Row("eh_proj.weight", "nextn.eh_proj.weight", ("hidden", "two_hidden")),
    Row("transformer.shared_head.norm.weight", "nextn.shared_head_norm.weight", ("hidden",)),
    Row("transformer.shared_head.output.weight", "nextn.shared_head_head.weight", ("vocab", "hidden")),
)

ROPE_FREQS = "rope_freqs.weight"  # in GGUF only: divisors of the rotary frequencies of full-attention layers
EXACT_NORM = "stepflash.norm."  # + GGUF name: metadata with the norm weights that 1 + w would round
SCALE_SUFFIX = "_scale_inv"  # FP8: `X.weight` has its block scales in `X.weight_scale_inv`
LAYER = re.compile(r"model\.layers\.(\d+)\.")


class ExpectedTensor(NamedTuple):
    """A parameter of one configuration: both names and the row-major shape (GGUF lists it reversed)."""

    released: str
    gguf: str
    shape: Shape


def expected(config: ModelConfig) -> Iterator[ExpectedTensor]:
    """Every parameter of this configuration, layer by layer, in the order in which a forward pass meets them."""
    sizes = _sizes(config, config.layers[0])
    yield _at(TOP[0], "", "", sizes)
    for i, layer in enumerate(config.layers):
        rows = ATTENTION + (MOE if layer.is_moe else DENSE) + (MTP if i >= config.num_layers else ())
        sizes = _sizes(config, layer)
        for row in rows:
            yield _at(row, f"model.layers.{i}.", f"blk.{i}.", sizes)
    for row in TOP[1:]:
        yield _at(row, "", "", sizes)


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Released name -> row-major shape. 804 for the released configuration."""
    return {tensor.released: tensor.shape for tensor in expected(config)}


def expected_scales(config: ModelConfig, block_size: int = 128) -> dict[str, Shape]:
    """Name -> shape of the FP8 scale beside each matrix that the FP8 repository may store in e4m3 (spec 5.3)."""
    return {
        tensor.released + SCALE_SUFFIX: scale_shape(tensor.shape, (block_size, block_size))
        for tensor in expected(config)
        if tensor.released.endswith("_proj.weight")
    }


def expected_gguf(config: ModelConfig) -> dict[str, Shape]:
    """GGUF name -> shape in ggml order, `rope_freqs` included. 754 for the released one without MTP."""
    shapes = {tensor.gguf: tensor.shape[::-1] for tensor in expected(config)}
    shapes[ROPE_FREQS] = (config.layers[0].head_dim // 2,)
    return shapes


def scale_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    """One scale for each block[0] x block[1] patch of the last two dimensions."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def is_norm(name: str) -> bool:
    """True for RMSNorm weights, by either name: the released ones are zero-centred, those of a GGUF are not."""
    return name.endswith("norm.weight")


def keeps_float32(released: str) -> bool:
    """True for the parameters that are float32 whatever the model's dtype: norms and router (spec 2.2, 3.2)."""
    return is_norm(released) or released.endswith(("moe.gate.weight", "moe.router_bias"))


def layer_of(released: str) -> int | None:
    match = LAYER.match(released)
    return int(match[1]) if match else None


def _at(row: Row, released: str, gguf: str, sizes: dict[str, int]) -> ExpectedTensor:
    return ExpectedTensor(released + row.released, gguf + row.gguf, tuple(sizes[dim] for dim in row.dims))


def _sizes(config: ModelConfig, layer: LayerConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "two_hidden": 2 * config.hidden_size,
        "q": layer.num_heads * layer.head_dim,
        "kv": layer.num_kv_heads * layer.head_dim,
        "heads": layer.num_heads,
        "head_dim": layer.head_dim,
        "inter": config.intermediate_size,
        "experts": config.num_experts,
        "expert_inter": config.moe_intermediate_size,
        "shared_inter": config.shared_expert_intermediate_size,
    }


# ---- other spellings in safetensors -------------------------------------------------------------------------

# Prefixes of wrappers around the text model, longest first, and what they stand for.
_WRAPPERS = (
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
# The image side of a Step-3.7 wrapper: known, and not part of the text model.
VISION_PREFIXES = (
    "vision_model.",
    "vit_large_projector.",
    "model.vision_model.",
    "model.vit_large_projector.",
    "model.multi_modal_projector.",
)
_SHARED_HEAD = re.compile(r"(model\.layers\.\d+)\.shared_head\.(norm|head|output)\.")
_ONE_EXPERT = re.compile(r"(model\.layers\.\d+\.moe)\.(?:experts\.)?(\d+)\.((?:gate|up|down)_proj\..*)")


def released_name(name: str) -> tuple[str, int | None]:
    """The released name of a safetensors tensor, and the expert that it belongs to if experts are split.

    `...moe.experts.7.up_proj.weight` and `...moe.7.up_proj.weight` give (`...moe.up_proj.weight`, 7), also for
    FP8 scales. A name that no rule knows comes back as it is.
    """
    for prefix, meaning in _WRAPPERS:
        if name.startswith(prefix):
            name = meaning + name.removeprefix(prefix)
            break
    if match := _SHARED_HEAD.match(name):
        part = "norm" if match[2] == "norm" else "output"
        name = f"{match[1]}.transformer.shared_head.{part}.{name[match.end() :]}"
    if match := _ONE_EXPERT.fullmatch(name):
        return f"{match[1]}.{match[3]}", int(match[2])
    return name, None
