"""The network against golden files of other implementations and against `reference.py` (golden, brute force)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stepflash.model.config import ModelConfig
from stepflash.model.transformer import Step3p5ForCausalLM
from tests.model.reference import Reference

FIXTURES = Path(__file__).parent.parent / "fixtures"


def build(config: ModelConfig, tensors: dict[str, Tensor] | None = None) -> Step3p5ForCausalLM:
    with torch.device("meta"):
        model = Step3p5ForCausalLM(config)
    if tensors is not None:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model


def random_tensors(model: Step3p5ForCausalLM, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.state_dict().items():
        scale = 0.1 if parameter.ndim == 1 else 2.0 * parameter.shape[-1] ** -0.5
        tensors[name] = torch.empty(parameter.shape).normal_(0, scale, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def micro() -> Step3p5ForCausalLM:
    config = ModelConfig.from_pretrained(FIXTURES / "micro")
    return build(config, load_file(FIXTURES / "micro" / "model-00001.safetensors"))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(FIXTURES / "micro" / "transformers-logits-f32.npz") as file:
        return {key: file[key] for key in file.files}


def test_trunk_equals_transformers(micro: Step3p5ForCausalLM, golden: dict[str, Any]) -> None:
    ids = torch.from_numpy(golden["ids"]).long()
    ours = micro.logits(ids).log_softmax(-1)
    theirs = torch.from_numpy(golden["logits"]).log_softmax(-1)
    assert (ours - theirs).abs().max() < 2e-4


def test_greedy_tokens_equal_transformers(micro: Step3p5ForCausalLM, golden: dict[str, Any]) -> None:
    ids = torch.from_numpy(golden["ids"]).long()
    prompt = int(golden["prompt_len"])
    assert torch.equal(micro.logits(ids)[prompt - 1 : -1].argmax(-1), ids[prompt:])


def test_prediction_modules_equal_golden(micro: Step3p5ForCausalLM, golden: dict[str, Any]) -> None:
    with np.load(FIXTURES / "micro" / "mtp-logits-f32.npz") as file:
        theirs = torch.from_numpy(file["mtp_logits"])
    ours = micro.mtp_logits(torch.from_numpy(golden["ids"]).long())
    assert torch.equal(ours.isnan(), theirs.isnan())
    known = ~theirs.isnan()
    assert (ours.log_softmax(-1) - theirs.log_softmax(-1))[known].abs().max() < 2e-4


SHAPES: dict[str, dict[str, Any]] = {
    "many_heads": {"num_attention_heads": 8, "sliding_heads": 12, "groups": 4, "head_dim": 16},
    "one_kv_head": {"num_attention_heads": 3, "sliding_heads": 5, "groups": 1, "head_dim": 32},
    "no_mtp": {"num_nextn_predict_layers": 0},
    "one_mtp": {"num_nextn_predict_layers": 1},
    "wide_window": {"sliding_window": 1000},
    "window_of_one": {"sliding_window": 1},
    "all_experts": {"moe_num_experts": 3, "moe_top_k": 3},
    "one_expert": {"moe_num_experts": 5, "moe_top_k": 1},
    "dense_between": {"moe_layers_enum": [1, 3]},
    "clamps": {
        "limits": [0.0, 0.5, 0.3, 1.0, 0.2, 0.0, 0.0, 0.0],
        "shared": [0.4, 0.0, 0.2, 0.1, 1.0, 0.3, 0.0, 0.2],
    },
    "all_full": {"types": ["full_attention"] * 8},
    "short_lists": {"list_length": 5},
}


def config_of(change: dict[str, Any]) -> dict[str, Any]:
    """A five-layer configuration with one thing changed."""
    modules = change.get("num_nextn_predict_layers", 3)
    total = 5 + modules
    types = change.get("types", ["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(8)])[
        :total
    ]
    shown = change.get("list_length", total)
    dim = change.get("head_dim", 16)
    groups = change.get("groups", 2)
    raw = {
        "model_type": "step3p5",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": modules,
        "layer_types": types[:shown],
        "num_attention_heads": change.get("num_attention_heads", 4),
        "num_attention_groups": groups,
        "head_dim": dim,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": change.get("sliding_heads", 6),
            "num_attention_groups": groups,
            "head_dim": dim,
        },
        "sliding_window": change.get("sliding_window", 7),
        "max_position_embeddings": 4096,
        "rope_theta": [5e6 if kind == "full_attention" else 1e4 for kind in types][:shown],
        "partial_rotary_factors": [0.5 if kind == "full_attention" else 1.0 for kind in types][:shown],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
            "original_max_position_embeddings": 24,
        },
        "yarn_only_types": ["full_attention"],
        "moe_layers_enum": change.get("moe_layers_enum", "2,3,4"),
        "moe_num_experts": change.get("moe_num_experts", 6),
        "moe_top_k": change.get("moe_top_k", 2),
        "moe_intermediate_size": 24,
        "share_expert_dim": 32,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": change.get("limits", [0.0] * 8)[:shown],
        "swiglu_limits_shared": change.get("shared", [0.0] * 8)[:shown],
    }
    return raw


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_equal_the_equations(name: str) -> None:
    raw = config_of(SHAPES[name])
    config = ModelConfig.from_dict(raw)
    model = build(config)
    tensors = random_tensors(model, seed=list(SHAPES).index(name))
    model = build(config, tensors)
    # The reference wants its lists in full; the missing entries of a short list are the released ones'.
    full = config_of({key: value for key, value in SHAPES[name].items() if key != "list_length"})
    reference = Reference(full, {key: tensor.numpy() for key, tensor in tensors.items()})
    ids = torch.randint(0, 97, (33,), generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(reference.logits(ids.tolist())).log_softmax(-1)
    assert (model.logits(ids).double().log_softmax(-1) - expected).abs().max() < 2e-4
    drafts = model.mtp_logits(ids)
    for k, rows in enumerate(reference.mtp_logits(ids.tolist()), start=1):
        ours = drafts[k - 1, : 33 - k].double().log_softmax(-1)
        assert (ours - torch.from_numpy(rows).log_softmax(-1)).abs().max() < 2e-4
        assert drafts[k - 1, 33 - k :].isnan().all()


def released_tensors() -> dict[str, tuple[int, ...]]:
    """Every tensor of the released bf16 checkpoint, from its published list of patterns."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128896, 4096),
        "lm_head.weight": (128896, 4096),
        "model.norm.weight": (4096,),
    }
    for i in range(48):
        p = f"model.layers.{i}."
        heads = 64 if i % 4 == 0 else 96
        tensors |= {
            p + "input_layernorm.weight": (4096,),
            p + "post_attention_layernorm.weight": (4096,),
            p + "self_attn.q_proj.weight": (heads * 128, 4096),
            p + "self_attn.k_proj.weight": (1024, 4096),
            p + "self_attn.v_proj.weight": (1024, 4096),
            p + "self_attn.o_proj.weight": (4096, heads * 128),
            p + "self_attn.g_proj.weight": (heads, 4096),
            p + "self_attn.q_norm.weight": (128,),
            p + "self_attn.k_norm.weight": (128,),
        }
        if i < 3 or i >= 45:
            tensors |= {p + f"mlp.{n}_proj.weight": (11264, 4096) for n in ("gate", "up")}
            tensors[p + "mlp.down_proj.weight"] = (4096, 11264)
        else:
            tensors |= {p + f"moe.{n}_proj.weight": (288, 1280, 4096) for n in ("gate", "up")}
            tensors |= {p + f"share_expert.{n}_proj.weight": (1280, 4096) for n in ("gate", "up")}
            tensors |= {
                p + "moe.gate.weight": (288, 4096),
                p + "moe.router_bias": (288,),
                p + "moe.down_proj.weight": (288, 4096, 1280),
                p + "share_expert.down_proj.weight": (4096, 1280),
            }
        if i >= 45:
            tensors |= {
                p + "enorm.weight": (4096,),
                p + "hnorm.weight": (4096,),
                p + "eh_proj.weight": (4096, 8192),
                p + "transformer.shared_head.norm.weight": (4096,),
                p + "transformer.shared_head.output.weight": (128896, 4096),
            }
    return tensors


def test_names_and_shapes_of_the_released_checkpoint() -> None:
    model = build(ModelConfig.from_pretrained(FIXTURES / "step-3.5-flash-config.json"))
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = released_tensors()
    assert len(expected) == 804
    assert ours == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 199_384_301_376


def test_experts_can_be_watched_and_replaced(micro: Step3p5ForCausalLM) -> None:
    ids = torch.arange(20)
    seen: dict[int, Tensor] = {}

    def record(layer_idx: int, scores: Tensor, topk_ids: Tensor) -> Tensor:
        seen[layer_idx] = topk_ids
        return topk_ids

    def replay(layer_idx: int, scores: Tensor, topk_ids: Tensor) -> Tensor:
        return seen[layer_idx]

    def shift(layer_idx: int, scores: Tensor, topk_ids: Tensor) -> Tensor:
        return (topk_ids + 1) % scores.shape[-1]

    positions, attend = micro._one_document(ids)
    with torch.inference_mode():
        plain = micro(ids, positions, attend, record)
        assert torch.equal(micro(ids, positions, attend, replay), plain)
        assert not torch.allclose(micro(ids, positions, attend, shift), plain)
    assert sorted(seen) == [2, 3, 4, 5, 6, 7]


def test_empty_input_is_refused(micro: Step3p5ForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        micro.logits(torch.zeros(0, dtype=torch.int64))


def test_fixture_config_is_the_published_one() -> None:
    raw = json.loads((FIXTURES / "step-3.5-flash-config.json").read_text())
    assert len(raw["layer_types"]) == 48
    assert raw["num_hidden_layers"] == 45
