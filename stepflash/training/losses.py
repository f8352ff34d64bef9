"""Losses as functions of the model and a pack: next-token prediction and multi-token prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stepflash.model.attention import Attend
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.training.data import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """Mean cross-entropy in nats over the targets, and how many of them were the argmax."""

    loss: Tensor
    num_targets: int
    num_correct: int


def next_token_loss(model: Step3p5ForCausalLM, hidden_states: Tensor, batch: PackedBatch) -> TokenLoss:
    """Cross-entropy of the trunk on every target token; the head runs on the rows that count only."""
    rows, targets = batch.targets(1)
    return _cross_entropy(model.compute_logits(hidden_states[rows]), targets)


def mtp_losses(
    model: Step3p5ForCausalLM, hidden_states: Tensor, batch: PackedBatch, attend: Attend, num_modules: int
) -> list[TokenLoss]:
    """Cross-entropy of MTP modules 1 .. num_modules, chained as in decoding; arguments as `mtp_states`."""
    losses = []
    for module, states in enumerate(mtp_states(model, hidden_states, batch, attend, num_modules), start=1):
        rows, targets = batch.targets(module + 1)
        losses.append(_cross_entropy(model.mtp_compute_logits(module, states[rows]), targets))
    return losses


def mtp_states(
    model: Step3p5ForCausalLM, hidden_states: Tensor, batch: PackedBatch, attend: Attend, num_modules: int
) -> Iterator[Tensor]:
    """Hidden states [num_tokens, hidden_size] of MTP modules 1 .. num_modules, chained as in decoding.

    hidden_states: the trunk's, before its final norm; detach them to leave the trunk alone. Inputs past the end of
    a document are wrong, but no target looks at them and causal attention keeps them to themselves.
    """
    for module in range(1, num_modules + 1):
        input_ids = torch.cat((batch.input_ids[module:], batch.input_ids.new_zeros(module)))
        hidden_states = model.mtp_forward(module, input_ids, hidden_states, batch.positions, attend)
        yield hidden_states


def offset_weights(num_modules: int, beta: float = 0.6) -> Sequence[float]:
    """Weights of the modules' losses, falling with distance and summing to 1 (as FastMTP, arXiv 2509.18362)."""
    raw = [beta**k for k in range(num_modules)]
    return [w / sum(raw) for w in raw]


def _cross_entropy(logits: Tensor, targets: Tensor) -> TokenLoss:
    if not targets.shape[0]:
        return TokenLoss(loss=logits.sum() * 0.0, num_targets=0, num_correct=0)
    return TokenLoss(
        loss=F.cross_entropy(logits, targets),
        num_targets=targets.shape[0],
        num_correct=int((logits.detach().argmax(-1) == targets).sum()),
    )
