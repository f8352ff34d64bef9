"""One training step: forward, losses, backward, reduce over workers, update, balance.

The trunk learns from next-token prediction; the prediction modules learn from the trunk's detached hidden states,
so that switching them on late changes nothing for the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from stepflash.model.attention import PackedAttention
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.training.balance import LoadCounter, update_router_bias
from stepflash.training.data import PackedBatch
from stepflash.training.losses import TokenLoss, mtp_losses, next_token_loss, offset_weights
from stepflash.training.optim import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRates:
    """What the schedule says for this step. `mtp_weight` 0 leaves the prediction modules alone."""

    lr: float
    router_bias: float
    mtp_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step saw. `losses[0]` is the trunk's, the others the prediction modules' in order; nats."""

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    num_tokens: int
    num_targets: int
    grad_norm: float
    max_load: float


def train_step(
    model: Step3p5ForCausalLM, optimizer: Optimizer, batch: PackedBatch, rates: StepRates
) -> StepReport:
    """Update the model on one pack per worker; every worker must call it, each with its own pack."""
    attend = PackedAttention(model.config.layers, batch.cu_seqlens, batch.input_ids.device)
    load = LoadCounter()
    hidden_states = model(batch.input_ids, batch.positions, attend, load)
    parts = [next_token_loss(model, hidden_states, batch)]
    total = parts[0].loss
    if rates.mtp_weight > 0:
        modules = model.config.num_mtp_layers
        drafts = mtp_losses(model, hidden_states.detach(), batch, attend, modules)
        weights = offset_weights(modules)
        total = total + rates.mtp_weight * sum(w * d.loss for w, d in zip(weights, drafts, strict=True))
        parts += drafts
    total.backward()  # type: ignore[no-untyped-call]
    _average_over_workers(optimizer, load)
    norm = optimizer.step(rates.lr)
    if rates.router_bias > 0:
        update_router_bias(model, load, rates.router_bias)
    return _report(parts, batch, norm, load)


def _average_over_workers(optimizer: Optimizer, load: LoadCounter) -> None:
    """Mean of the gradients and sum of the expert loads, in one flat buffer each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    parameters = [s.parameter for s in optimizer.states if s.parameter.grad is not None]
    flat = torch.cat([p.grad.float().flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = torch.split(flat, [p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(part.view_as(parameter))
    for layer_idx in sorted(load.counts):
        dist.all_reduce(load.counts[layer_idx])


def _report(parts: list[TokenLoss], batch: PackedBatch, norm: float, load: LoadCounter) -> StepReport:
    return StepReport(
        losses=tuple(float(part.loss.detach()) for part in parts),
        accuracies=tuple(part.num_correct / max(part.num_targets, 1) for part in parts),
        num_tokens=int(batch.input_ids.shape[0]),
        num_targets=parts[0].num_targets,
        grad_norm=norm,
        max_load=load.max_over_mean(),
    )
