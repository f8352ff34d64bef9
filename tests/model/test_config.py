"""Configuration: the released file's integers, its traps, and what must be refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from stepflash.model.cost import flops_per_token, num_mtp_parameters

FIXTURES = Path(__file__).parent.parent / "fixtures"
RELEASED: dict[str, Any] = json.loads((FIXTURES / "step-3.5-flash-config.json").read_text())


def changed(**changes: Any) -> dict[str, Any]:
    raw = copy.deepcopy(RELEASED)
    for key, value in changes.items():
        if value is ...:
            raw.pop(key, None)
        else:
            raw[key] = value
    return raw


def test_integers_of_the_released_model() -> None:
    config = ModelConfig.from_pretrained(FIXTURES / "step-3.5-flash-config.json")
    assert config.num_parameters() == config.num_parameters(trunk=True) == 196_956_130_368
    assert config.num_parameters(trunk=False) == 199_384_301_376
    assert [num_mtp_parameters(config, k) for k in (1, 2, 3)] == [809_390_336] * 3
    assert config.num_active_parameters() == 11_459_365_952
    assert config.kv_bytes_per_token("bfloat16") == 48 * 1024
    assert config.kv_bytes_per_sequence("bfloat16") == 66 * 1024**2
    assert config.kv_bytes_per_sequence("bfloat16", mtp=True) == 72 * 1024**2
    assert config.rms_norm_eps == 1e-5
    assert [i for i, layer in enumerate(config.layers) if layer.swiglu_limit] == [43, 44]
    assert [i for i, layer in enumerate(config.layers) if layer.shared_swiglu_limit] == [44]
    assert [layer.num_heads for layer in config.layers[44:]] == [64, 96, 96, 96]
    assert sum(layer.is_moe for layer in config.layers) == 42


def test_flops_follow_the_published_ratio() -> None:
    """Report, table 8: all 45 layers full cost 2.07 times the prefill FLOPs of the 64-head layout at 64K context.

    The published columns count 2 per active parameter without the LM head and half the context on average.
    """
    context = 65536

    def prefill(raw: dict[str, Any]) -> float:
        config = ModelConfig.from_dict(raw)
        return flops_per_token(config, context // 2) - 2 * config.vocab_size * config.hidden_size

    narrow = copy.deepcopy(RELEASED["attention_other_setting"]) | {"num_attention_heads": 64}
    base = changed(attention_other_setting=narrow)
    full = changed(
        layer_types=["full_attention"] * 48, partial_rotary_factors=[0.5] * 48, attention_other_setting=None
    )
    assert prefill(full) / prefill(base) == pytest.approx(2.07, abs=0.03)
    assert prefill(RELEASED) / prefill(base) == pytest.approx(1.08, abs=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layers_enum": list(range(3, 45))},
        {"moe_layers_enum": tuple(range(3, 45))},
        {"share_expert_dim": ..., "share_expert_dims": 1280},
        {key: RELEASED[key][:45] for key in ("layer_types", "rope_theta", "partial_rotary_factors")},
        {
            "swiglu_limits": RELEASED["swiglu_limits"][:45],
            "swiglu_limits_shared": RELEASED["swiglu_limits_shared"][:45],
        },
        {"swiglu_limits": [v or None for v in RELEASED["swiglu_limits"]]},
        {"rms_norm_eps": 1e-5},
        {"max_position_embeddings": ...},
        {"torch_dtype": ..., "dtype": "bfloat16"},
        {"num_nextn_predict_layers": ...},
        {"unknown_future_key": {"a": 1}},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_other_spellings_mean_the_same(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(changed(**changes)) == ModelConfig.from_dict(RELEASED)


def test_wrapper_configuration() -> None:
    wrapper = {"model_type": "step3p7", "text_config": RELEASED, "vision_config": {}, "eos_token_id": [9]}
    assert ModelConfig.from_dict(wrapper) == ModelConfig.from_dict(RELEASED)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"layer_types": RELEASED["layer_types"][:44]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 48}, "layer_types"),
        ({"layer_types": ...}, "layer_types"),
        ({"rope_theta": [1e4] * 46}, "rope_theta"),
        ({"rope_theta": ...}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factors": 1.5}, "partial_rotary_factors"),
        ({"moe_layers_enum": "3,4,99"}, "moe_layers_enum"),
        ({"moe_layers_enum": "three"}, "moe_layers_enum"),
        ({"moe_layers_enum": ...}, "moe_layers_enum"),
        ({"moe_top_k": 300}, "moe_top_k"),
        ({"moe_router_activation": "softmax"}, "moe_router_activation"),
        ({"num_attention_groups": 7}, "num_attention_heads"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 45.5}, "num_hidden_layers"),
        ({"num_nextn_predict_layers": 4}, "num_nextn_predict_layers"),
        ({"swiglu_limits": [-1.0] * 48}, "swiglu_limits"),
        ({"sliding_window": -5}, "sliding_window"),
        ({"sink": True}, "sink"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"use_rope_layers": [True, False]}, "use_rope_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ],
)
def test_wrong_configurations_name_the_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        ModelConfig.from_dict(changed(**changes))
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        ModelConfig.from_pretrained(tmp_path)


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    """The released model's metadata as llama.cpp's converter writes it, without the prediction modules."""
    sliding = [i % 4 != 0 for i in range(45)]
    metadata = {
        "block_count": 45,
        "context_length": 262144,
        "embedding_length": 4096,
        "feed_forward_length": 11264,
        "attention.head_count": [96 if flag else 64 for flag in sliding],
        "attention.head_count_kv": [8] * 45,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 512,
        "attention.sliding_window_pattern": sliding,
        "rope.freq_base": 5e6,
        "rope.freq_base_swa": 1e4,
        "expert_count": 288,
        "expert_used_count": 8,
        "expert_feed_forward_length": 1280,
        "expert_shared_feed_forward_length": 1280,
        "expert_gating_func": 2,
        "expert_weights_scale": 3.0,
        "expert_weights_norm": True,
        "leading_dense_block_count": 3,
        "swiglu_clamp_exp": [0.0] * 43 + [7.0, 7.0],
        "swiglu_clamp_shexp": [0.0] * 44 + [16.0],
        "vocab_size": 128896,
        **changes,
    }
    result = {
        "general.architecture": "step35",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 128007,
    }
    return result | {f"step35.{key}": value for key, value in metadata.items() if value is not ...}


def test_gguf_metadata_describes_the_same_trunk() -> None:
    theirs, ours = ModelConfig.from_gguf(gguf_metadata()), ModelConfig.from_dict(RELEASED)
    assert theirs.layers == ours.trunk_layers
    assert theirs.num_parameters() == ours.num_parameters()


def test_gguf_with_prediction_modules_and_short_arrays() -> None:
    """Files made by older tools have arrays of 45 for 48 blocks."""
    config = ModelConfig.from_gguf(gguf_metadata(block_count=48, nextn_predict_layers=3))
    assert config.layers == ModelConfig.from_dict(RELEASED).layers


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"block_count": ...}, "block_count"),
        ({"attention.sliding_window_pattern": ...}, "sliding_window_pattern"),
        ({"attention.head_count": [64] * 44}, "head_count"),
        ({"expert_gating_func": 1}, "expert_gating_func"),
        ({"attention.head_count": 63}, "head_count"),
    ],
)
def test_wrong_gguf_metadata_names_the_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_gguf(gguf_metadata(**changes))


def test_other_gguf_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"general\.architecture"):
        ModelConfig.from_gguf({"general.architecture": "llama"})
