"""Rotary position embedding, per layer: its own theta, width and frequency scaling.

The first `rotary_dim` dimensions of a head turn in pairs (j, j + rotary_dim / 2); the rest pass through.
Tables are fp32 and computed from positions when needed: nothing is stored in the checkpoint or on the module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepflash.model.config import RopeConfig

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [num_tokens, 1, rotary_dim / 2] float32


def inverse_frequencies(rope: RopeConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each pair: [rotary_dim / 2] float32.

    theta^(-2j / rotary_dim); with llama3 scaling, wavelengths above original / low_freq_factor are divided by
    `factor`, those below original / high_freq_factor kept, and a linear ramp joins them (Llama 3.1 model card;
    StepFun's trainer calls the same thing YaRN with beta 1 and 32).
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device=device) / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotation(inverse: Tensor, positions: Tensor) -> Rotation:
    """cos and sin of every position for one set of inverse frequencies."""
    angles = positions.to(torch.float32)[:, None, None] * inverse  # [num_tokens, 1, rotary_dim / 2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos_sin: Rotation) -> Tensor:
    """Turn the leading dimensions of x [num_tokens, num_heads, head_dim]; dtype is kept, the math is fp32."""
    cos, sin = cos_sin
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1) if rest.shape[-1] else turned.to(x.dtype)
