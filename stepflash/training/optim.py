"""Muon for matrices, AdamW for the rest, both over fp32 master copies of the parameters.

Muon: momentum, then the nearest (semi-)orthogonal matrix by the Polar Express iteration (arXiv 2505.16932),
scaled so that its update has the RMS that AdamW's would have (0.2, arXiv 2502.16982). Stacked expert matrices are
orthogonalised expert by expert. Coefficients, momentum and weight decay are those of Step-3.5-Flash's training
(report, section 4.1.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, one triple per step.
POLAR_EXPRESS = (
    (8.28721, -23.59589, 17.30039),
    (4.10706, -2.94785, 0.54484),
    (3.94869, -2.90890, 0.55182),
    (3.31842, -2.48849, 0.51005),
    (2.30065, -1.66890, 0.41881),
    (1.89130, -1.26800, 0.37680),
)
SAFETY = 1.01


def orthogonalize(gradient: Tensor, num_steps: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal polar factor of each matrix of [..., rows, cols], approximately; fp32 out.

    `dtype` is that of the iteration: float16 on a GPU as in the report (bfloat16 there gave rare outliers),
    float32 or bfloat16 on a CPU.
    """
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.mT if tall else gradient
    norm = torch.linalg.matrix_norm(x.float(), keepdim=True)
    x = (x.float() / (norm * SAFETY + 1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS[:num_steps]:
        a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


@dataclass
class ParameterState:
    """Everything the optimiser remembers about one parameter."""

    name: str
    parameter: nn.Parameter
    use_muon: bool
    lr_scale: float
    weight_decay: float
    master: Tensor
    moments: list[Tensor] = field(default_factory=list)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon's share: every linear map and every expert, but neither embeddings, LM heads nor the router."""
    excluded = ("embed_tokens", "lm_head", "shared_head.output", "moe.gate.weight")
    return parameter.ndim >= 2 and not any(part in name for part in excluded)


class Optimizer:
    """One step over all parameters with a gradient. `lr` is given at each step by the schedule."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        weight_decay: float = 0.1,
        adam_lr_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        muon_steps: int = 6,
        muon_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.betas, self.eps, self.momentum = betas, eps, momentum
        self.muon_steps, self.muon_dtype = muon_steps, muon_dtype
        self.num_updates = 0
        self.states: list[ParameterState] = []
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            use_muon = is_matrix(name, parameter)
            master = parameter.detach().float().clone()
            state = ParameterState(
                name=name,
                parameter=parameter,
                use_muon=use_muon,
                lr_scale=1.0 if use_muon else adam_lr_scale,
                weight_decay=weight_decay if parameter.ndim >= 2 else 0.0,
                master=master,
            )
            state.moments = [torch.zeros_like(master) for _ in range(1 if use_muon else 2)]
            self.states.append(state)

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float = 1.0) -> float:
        """Apply one update and clear the gradients; returns the gradient norm before clipping."""
        norm = math.sqrt(sum(float(g.float().square().sum()) for _, g in self._gradients()))
        scale = min(1.0, max_grad_norm / (norm + 1e-6))
        if not math.isfinite(norm):  # a broken batch must not reach the weights
            self.zero_grad()
            return norm
        self.num_updates += 1
        for state, gradient in self._gradients():
            gradient = gradient.float() * scale
            update = self._muon(state, gradient) if state.use_muon else self._adam(state, gradient)
            rate = lr * state.lr_scale
            state.master.mul_(1.0 - rate * state.weight_decay).add_(update, alpha=-rate)
            state.parameter.copy_(state.master)
        self.zero_grad()
        return norm

    @torch.no_grad()
    def refresh_masters(self, prefix: str) -> None:
        """Take the present values of the parameters whose name starts so, after they were set from outside."""
        for state in self.states:
            if state.name.startswith(prefix):
                changed = state.parameter.float() != state.master.to(state.parameter.dtype).float()
                state.master.copy_(torch.where(changed, state.parameter.float(), state.master))

    def zero_grad(self) -> None:
        for state in self.states:
            state.parameter.grad = None

    def _gradients(self) -> Iterator[tuple[ParameterState, Tensor]]:
        return ((s, s.parameter.grad) for s in self.states if s.parameter.grad is not None)

    def _muon(self, state: ParameterState, gradient: Tensor) -> Tensor:
        buffer = state.moments[0].mul_(self.momentum).add_(gradient)
        nesterov = gradient + self.momentum * buffer
        rows, cols = gradient.shape[-2:]
        return orthogonalize(nesterov, self.muon_steps, self.muon_dtype) * (0.2 * math.sqrt(max(rows, cols)))

    def _adam(self, state: ParameterState, gradient: Tensor) -> Tensor:
        mean, square = state.moments
        beta1, beta2 = self.betas
        mean.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        corrected = square / (1.0 - beta2**self.num_updates)
        return mean / (1.0 - beta1**self.num_updates) / (corrected.sqrt() + self.eps)

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_updates": self.num_updates,
            "states": {s.name: {"master": s.master, "moments": s.moments} for s in self.states},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises ValueError when the saved parameters are not these."""
        ours = {state.name for state in self.states}
        if ours != set(saved["states"]):
            difference = sorted(ours ^ set(saved["states"]))[:5]
            raise ValueError(f"optimizer state is of another model: differs in {', '.join(difference)}")
        self.num_updates = saved["num_updates"]
        for state in self.states:
            state.master.copy_(saved["states"][state.name]["master"])
            for ours_, theirs in zip(state.moments, saved["states"][state.name]["moments"], strict=True):
                ours_.copy_(theirs)
            with torch.no_grad():
                state.parameter.copy_(state.master)
