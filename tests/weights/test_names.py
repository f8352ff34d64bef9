"""Names and shapes: against the patterns of the released checkpoint written out here, and against the network."""

import json
import math
from pathlib import Path

import pytest
import torch

from stepflash.model.config import ModelConfig
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.names import (
    expected,
    expected_gguf,
    expected_scales,
    expected_tensors,
    is_norm,
    keeps_float32,
    released_name,
)
from tests.weights.variants import MICRO, gguf_name, micro_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def real() -> ModelConfig:
    return ModelConfig.from_dict(json.loads((FIXTURES / "step-3.5-flash-config.json").read_text()))


def released_tensors() -> dict[str, tuple[int, ...]]:
    """The bf16 repository's list, from the spec's section 5.1 and 4.1 and its table of projections (2.3)."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128896, 4096),
        "lm_head.weight": (128896, 4096),
        "model.norm.weight": (4096,),
    }
    for i in range(48):
        at = f"model.layers.{i}."
        heads = 64 if i % 4 == 0 and i < 45 else 96
        tensors |= {
            at + "input_layernorm.weight": (4096,),
            at + "post_attention_layernorm.weight": (4096,),
            at + "self_attn.q_proj.weight": (heads * 128, 4096),
            at + "self_attn.k_proj.weight": (1024, 4096),
            at + "self_attn.v_proj.weight": (1024, 4096),
            at + "self_attn.o_proj.weight": (4096, heads * 128),
            at + "self_attn.g_proj.weight": (heads, 4096),
            at + "self_attn.q_norm.weight": (128,),
            at + "self_attn.k_norm.weight": (128,),
        }
        if i < 3 or i >= 45:
            tensors |= {at + f"mlp.{p}_proj.weight": (11264, 4096) for p in ("gate", "up")}
            tensors[at + "mlp.down_proj.weight"] = (4096, 11264)
        else:
            tensors |= {
                at + "moe.gate.weight": (288, 4096),
                at + "moe.router_bias": (288,),
                at + "moe.gate_proj.weight": (288, 1280, 4096),
                at + "moe.up_proj.weight": (288, 1280, 4096),
                at + "moe.down_proj.weight": (288, 4096, 1280),
                at + "share_expert.gate_proj.weight": (1280, 4096),
                at + "share_expert.up_proj.weight": (1280, 4096),
                at + "share_expert.down_proj.weight": (4096, 1280),
            }
        if i >= 45:
            tensors |= {
                at + "enorm.weight": (4096,),
                at + "hnorm.weight": (4096,),
                at + "eh_proj.weight": (4096, 8192),
                at + "transformer.shared_head.norm.weight": (4096,),
                at + "transformer.shared_head.output.weight": (128896, 4096),
            }
    return tensors


def test_real_config_needs_exactly_the_released_804_tensors(real: ModelConfig) -> None:
    found = expected_tensors(real)
    assert found == released_tensors()
    assert len(found) == 804
    assert sum(math.prod(shape) for shape in found.values()) == 199_384_301_376


def test_network_has_exactly_these_parameters(real: ModelConfig) -> None:
    with torch.device("meta"):
        model = Step3p5ForCausalLM(real)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected_tensors(
        real
    )


def test_network_declares_the_same_parameters_float32() -> None:
    """Built under bf16 default, the parameters that the network itself makes float32 are those of the table."""
    config = ModelConfig.from_pretrained(MICRO)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Step3p5ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        assert keeps_float32(name) == (parameter.dtype == torch.float32), name


def test_micro_names_are_those_of_its_file() -> None:
    config = ModelConfig.from_pretrained(MICRO)
    assert expected_tensors(config) == {name: tuple(t.shape) for name, t in micro_tensors().items()}


def test_fp8_siblings_of_the_experts(real: ModelConfig) -> None:
    """Spec 5.3: gate and up [288, 10, 32], down [288, 32, 10]; 42 layers x 3 = 126 scales, 252 tensors."""
    scales = expected_scales(real)
    experts = {name: shape for name, shape in scales.items() if ".moe." in name}
    assert len(experts) == 126
    assert experts["model.layers.3.moe.gate_proj.weight_scale_inv"] == (288, 10, 32)
    assert experts["model.layers.44.moe.up_proj.weight_scale_inv"] == (288, 10, 32)
    assert experts["model.layers.9.moe.down_proj.weight_scale_inv"] == (288, 32, 10)
    assert all(name.removesuffix("_scale_inv") in expected_tensors(real) for name in scales)


def test_gguf_names_are_the_754_and_17_more_for_each_mtp_module(real: ModelConfig) -> None:
    shapes = expected_gguf(real)
    by_hand = {gguf_name(name): shape[::-1] for name, shape in released_tensors().items()}
    assert shapes == by_hand | {"rope_freqs.weight": (64,)}
    trunk = [name for name in shapes if not name.startswith(("blk.45.", "blk.46.", "blk.47."))]
    assert len(trunk) == 754
    assert len(shapes) == 754 + 3 * 17
    assert shapes["blk.5.ffn_down_exps.weight"] == (1280, 4096, 288)
    assert shapes["blk.45.nextn.eh_proj.weight"] == (8192, 4096)


def test_gguf_adds_one_to_every_norm_and_nothing_else(real: ModelConfig) -> None:
    """The converter's rule is the end of the name (spec 6.3); it must hold under both names."""
    rows = list(expected(real))
    assert all(is_norm(row.released) == is_norm(row.gguf) for row in rows)
    # 2 layer norms and 2 head norms per layer, 3 more per MTP module, the final one.
    assert sum(is_norm(row.released) for row in rows) == 48 * 4 + 3 * 3 + 1


@pytest.mark.parametrize(
    ("name", "released"),
    [
        ("model.layers.3.moe.gate.weight", ("model.layers.3.moe.gate.weight", None)),
        ("model.layers.3.moe.gate_proj.weight", ("model.layers.3.moe.gate_proj.weight", None)),
        ("model.layers.3.moe.experts.17.gate_proj.weight", ("model.layers.3.moe.gate_proj.weight", 17)),
        ("model.layers.3.moe.17.up_proj.weight", ("model.layers.3.moe.up_proj.weight", 17)),
        (
            "model.layers.3.moe.experts.0.down_proj.weight_scale_inv",
            ("model.layers.3.moe.down_proj.weight_scale_inv", 0),
        ),
        ("model.language_model.layers.3.enorm.weight", ("model.layers.3.enorm.weight", None)),
        ("language_model.model.norm.weight", ("model.norm.weight", None)),
        ("language_model.lm_head.weight", ("lm_head.weight", None)),
        (
            "model.language_model.layers.4.moe.experts.2.up_proj.weight",
            ("model.layers.4.moe.up_proj.weight", 2),
        ),
        (
            "model.layers.45.shared_head.head.weight",
            ("model.layers.45.transformer.shared_head.output.weight", None),
        ),
        (
            "model.layers.45.shared_head.norm.weight",
            ("model.layers.45.transformer.shared_head.norm.weight", None),
        ),
        (
            "model.layers.3.share_expert.gate_proj.weight",
            ("model.layers.3.share_expert.gate_proj.weight", None),
        ),
        ("something.else", ("something.else", None)),
    ],
)
def test_other_spellings(name: str, released: tuple[str, int | None]) -> None:
    assert released_name(name) == released
