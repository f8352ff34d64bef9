"""Rotary frequencies against the published test vector; rotation against complex numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from stepflash.model.config import ModelConfig, RopeConfig
from stepflash.model.rope import inverse_frequencies, rotate, rotation

CONFIG = Path(__file__).parent.parent / "fixtures" / "step-3.5-flash-config.json"


def test_divisors_of_the_full_layers() -> None:
    rope = ModelConfig.from_pretrained(CONFIG).layers[0].rope
    assert rope.rotary_dim == 64
    plain = inverse_frequencies(RopeConfig(theta=rope.theta, rotary_dim=64))
    divisors = plain / inverse_frequencies(rope)
    expected = [1.0] * 14 + [1.1384, 1.3745, 1.5764, 1.7337, 1.8476, 1.9256, 1.9773] + [2.0] * 11
    assert torch.allclose(divisors, torch.tensor(expected), atol=1e-4)


def test_sliding_layers_are_never_scaled() -> None:
    config = ModelConfig.from_pretrained(CONFIG)
    for layer in config.layers:
        assert (layer.rope.scaling is None) == (layer.window is not None)
    expected = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert torch.allclose(inverse_frequencies(config.layers[1].rope), expected)


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    rope = RopeConfig(theta=100.0, rotary_dim=6)
    x = torch.randn(5, 2, 10, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 7, 100, 3])
    turned = rotate(x, rotation(inverse_frequencies(rope), positions))
    angles = positions[:, None].double() * 100.0 ** (-torch.arange(0, 6, 2).double() / 6)
    pairs = (
        torch.complex(x[..., :3].double(), x[..., 3:6].double())
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    assert torch.allclose(turned[..., :3].double(), pairs.real, atol=1e-5)
    assert torch.allclose(turned[..., 3:6].double(), pairs.imag, atol=1e-5)
    assert torch.equal(turned[..., 6:], x[..., 6:])
