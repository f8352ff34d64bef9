"""What nano is and how it is trained, as data.

The shape is the released model's in small: one full-attention layer for three sliding ones, 1.5 times the query
heads in the sliding layers, half-width rotary embedding in the full ones, a dense first layer, experts with a shared
one, three prediction modules with their own heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
NUM_LAYERS, NUM_MTP_LAYERS = 9, 3
LAYER_TYPES = [FULL if i % 4 == 0 else SLIDING for i in range(NUM_LAYERS)] + [SLIDING] * NUM_MTP_LAYERS

CONFIG: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": NUM_LAYERS,
    "num_nextn_predict_layers": NUM_MTP_LAYERS,
    "layer_types": LAYER_TYPES,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": 64,
    "attention_other_setting": {
        "attention_type": SLIDING,
        "num_attention_heads": 6,
        "num_attention_groups": 2,
        "head_dim": 64,
        "true_head_dim": 64,
    },
    "sliding_window": 64,
    "rope_theta": [5000000.0 if kind == FULL else 10000.0 for kind in LAYER_TYPES],
    "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in LAYER_TYPES],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
        "original_max_position_embeddings": 131072,
    },
    "yarn_only_types": [FULL],
    "use_rope_layers": [],
    "max_position_embeddings": 32768,
    "max_seq_len": 32768,
    "rms_norm_eps": 1e-5,
    "use_moe": True,
    "moe_layers_enum": ",".join(str(i) for i in range(1, NUM_LAYERS)),
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_intermediate_size": 192,
    "share_expert_dim": 192,
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "swiglu_limits": [0.0] * (NUM_LAYERS - 2) + [7.0, 7.0] + [0.0] * NUM_MTP_LAYERS,
    "swiglu_limits_shared": [0.0] * (NUM_LAYERS - 1) + [16.0] + [0.0] * NUM_MTP_LAYERS,
    "att_impl_type": "GQA",
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "zero_centered": True,
    "sink": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Numbers of a run. Shares are of the run's tokens."""

    tokens: int = 6_850_000
    tokens_per_pack: int = 6144
    max_document_tokens: int = 1024
    peak_lr: float = 4e-3
    adam_lr_scale: float = 0.3
    weight_decay: float = 0.02
    warmup: float = 0.01
    decay_from: float = 0.45
    router_bias_rate: float = 5e-3
    router_bias_until: float = 0.8
    mtp_from: float = 0.65
    mtp_weight: float = 0.3
    head_norm_init: float = 0.3
    muon_steps: int = 5


SMOKE = Recipe(tokens=40_000, tokens_per_pack=1024)
