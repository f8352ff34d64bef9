"""What a configuration costs: parameters, floating-point operations, bytes of keys and values.

Pure arithmetic on `ModelConfig`; the planner, `inspect` and the tests share it. Tensors are counted one by one
from the layer shapes, so the numbers hold for any checkpoint of the architecture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepflash.model.config import LayerConfig, ModelConfig


def num_attention_parameters(config: ModelConfig, layer: LayerConfig) -> int:
    """q, k, v, o, head gate, and the two head norms."""
    hidden, dim = config.hidden_size, layer.head_dim
    projections = hidden * dim * (2 * layer.num_heads + 2 * layer.num_kv_heads)
    return projections + hidden * layer.num_heads + 2 * dim


def num_layer_parameters(config: ModelConfig, layer: LayerConfig, active: bool = False) -> int:
    """One decoder layer with its two norms; `active` counts only the experts that one token meets."""
    hidden = config.hidden_size
    count = num_attention_parameters(config, layer) + 2 * hidden
    if not layer.is_moe:
        return count + 3 * hidden * config.intermediate_size
    experts = config.num_experts_per_tok if active else config.num_experts
    router = config.num_experts * (hidden + 1)
    routed = experts * 3 * hidden * config.moe_intermediate_size
    return count + router + routed + 3 * hidden * config.shared_expert_intermediate_size


def num_trunk_parameters(config: ModelConfig) -> int:
    """All layers of the trunk, the final norm, the embedding and the LM head."""
    layers = sum(num_layer_parameters(config, layer) for layer in config.trunk_layers)
    return layers + config.hidden_size + 2 * config.vocab_size * config.hidden_size


def num_mtp_parameters(config: ModelConfig, module: int) -> int:
    """MTP module `module` (from 1) with its own norms, projection and LM head."""
    hidden = config.hidden_size
    layer = num_layer_parameters(config, config.mtp_layers[module - 1])
    return layer + 3 * hidden + 2 * hidden * hidden + config.vocab_size * hidden


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that take part in one token of the trunk, LM head included, embedding lookup not."""
    layers = sum(num_layer_parameters(config, layer, active=True) for layer in config.trunk_layers)
    return layers + config.hidden_size + config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Multiply-adds counted as two, for one token of the trunk that sees `context` tokens before and with it.

    Linear layers cost 2 per active parameter; attention 4 * head_dim * heads per visible key.
    """
    attention = sum(
        4 * layer.head_dim * layer.num_heads * min(context, layer.window or context)
        for layer in config.trunk_layers
    )
    return 2 * num_active_parameters(config) + attention


def kv_bytes_per_position(layer: LayerConfig, dtype_bytes: int) -> int:
    """Key and value of one position in one layer."""
    return 2 * layer.num_kv_heads * layer.head_dim * dtype_bytes


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int) -> int:
    """What grows with the context: the full-attention layers of the trunk."""
    return sum(
        kv_bytes_per_position(layer, dtype_bytes) for layer in config.trunk_layers if layer.window is None
    )


def kv_bytes_per_sequence(config: ModelConfig, dtype_bytes: int, mtp: bool = False) -> int:
    """What a sequence costs once: the windows of the sliding layers, `mtp` those of the prediction modules too."""
    layers = config.layers if mtp else config.trunk_layers
    return sum(kv_bytes_per_position(layer, dtype_bytes) * layer.window for layer in layers if layer.window)
