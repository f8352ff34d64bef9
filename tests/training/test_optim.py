"""Muon against the singular value decomposition, AdamW against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepflash.training.optim import Optimizer, is_matrix, orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (5, 24, 32), (3, 32, 24)])
def test_orthogonalize_gives_the_polar_factor(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    # Six steps bring every singular value near 1; the published bound for this many is a few per cent.
    assert (orthogonalize(gradient) - u @ vh).abs().max() < 0.05
    assert torch.linalg.svdvals(orthogonalize(gradient)).sub(1).abs().max() < 0.1


def test_orthogonalize_does_not_depend_on_the_scale() -> None:
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonalize(gradient * 1e4), orthogonalize(gradient), atol=1e-4)


def test_a_muon_update_has_the_rms_of_an_adam_update() -> None:
    weight = nn.Parameter(torch.zeros(64, 96))
    optimizer = Optimizer([("layers.0.q_proj.weight", weight)], weight_decay=0.0)
    weight.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)) * 1e-3
    optimizer.step(lr=1.0)
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_adam_equals_torch() -> None:
    ours = nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(3)))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = Optimizer([("norm.weight", ours)], weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(20):
        gradient = torch.randn(40, generator=torch.Generator().manual_seed(step)) * 0.01
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(lr=0.01)
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_bf16_parameters_follow_an_fp32_master() -> None:
    """A thousand steps too small for bf16 must still move the weight."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer([("norm.weight", weight)], weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step(lr=1e-4)
    assert weight.float().sub(0.9).abs().max() < 0.01


def test_gradients_are_clipped_to_the_norm() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Optimizer([("norm.weight", weight)])
    weight.grad = torch.tensor([3.0, 4.0, 0.0])
    assert optimizer.step(lr=0.0) == pytest.approx(5.0)
    # The first moment has 10 % of the clipped gradient.
    assert torch.allclose(optimizer.states[0].moments[0], 0.1 * torch.tensor([0.6, 0.8, 0.0]), atol=1e-5)


def test_a_broken_batch_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = Optimizer([("norm.weight", weight)])
    weight.grad = torch.tensor([1.0, float("nan"), 0.0])
    optimizer.step(lr=0.1)
    assert torch.equal(weight, torch.ones(3))
    assert optimizer.num_updates == 0


def test_what_muon_takes() -> None:
    matrix, stack, vector = torch.zeros(2, 2), torch.zeros(2, 2, 2), torch.zeros(2)
    assert is_matrix("model.layers.3.self_attn.q_proj.weight", matrix)
    assert is_matrix("model.layers.3.moe.gate_proj.weight", stack)
    assert is_matrix("model.layers.45.eh_proj.weight", matrix)
    assert not is_matrix("model.layers.3.moe.gate.weight", matrix)
    assert not is_matrix("model.embed_tokens.weight", matrix)
    assert not is_matrix("lm_head.weight", matrix)
    assert not is_matrix("model.layers.45.transformer.shared_head.output.weight", matrix)
    assert not is_matrix("model.norm.weight", vector)


def test_state_of_another_model_is_refused() -> None:
    first = Optimizer([("a", nn.Parameter(torch.zeros(2)))])
    second = Optimizer([("b", nn.Parameter(torch.zeros(2)))])
    with pytest.raises(ValueError, match="another model"):
        first.load_state_dict(second.state_dict())
