"""GPTQ: rounding to int4 so that the output of a layer changes least, not the weights (Frantar et al., 2022).

With inputs x the squared error of w x is (w - w') H (w - w')^T, H = sum of x x^T. Columns are rounded from left to
right, and what a column loses is made up for by those that are not rounded yet. The scale of a group is searched when
its first column is reached, on the weights as they are then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepflash.errors import WeightsError

DAMPING = 0.01  # of the mean diagonal, as in the paper: H of few tokens is singular
NUM_SCALES = 19


def gptq(weight: Tensor, factor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round stacked matrices to 4 bits.

    Args:
        weight: [batch, n, k] float32.
        factor: [batch, k, k], `inverse_factor` of the inputs; matrices that read the same inputs share it.
        group: consecutive k that share a scale.
    Returns:
        codes [batch, n, k] int8 in [-8, 7] and scales [batch, n, ceil(k / group)] float16.
    """
    k = weight.shape[-1]
    padding = -k % group
    left = F.pad(weight.float(), (0, padding))
    if padding:
        factor = F.pad(factor, (0, padding, 0, padding))
        factor.diagonal(dim1=1, dim2=2)[:, k:] = 1.0
    importance = factor.diagonal(dim1=1, dim2=2).square().reciprocal()  # [batch, k]
    codes = torch.empty_like(left, dtype=torch.int8)
    scales = []
    for start in range(0, left.shape[-1], group):
        end = start + group
        columns = left[..., start:end].clone()
        scale = search_scale(columns, importance[:, None, start:end])  # [batch, n]
        scales.append(scale)
        wide = scale.float()
        inverse = torch.where(wide == 0, 0.0, 1.0 / wide)
        errors = torch.empty_like(columns)
        block = factor[:, start:end, start:end]
        for j in range(group):
            column = columns[..., j]
            code = (column * inverse).round_().clamp_(-8, 7)
            codes[..., start + j] = code.to(torch.int8)
            errors[..., j] = (column - code * wide) / block[:, j, j, None]
            columns[..., j + 1 :] -= errors[..., j, None] * block[:, j, None, j + 1 :]
        left[..., end:] -= errors @ factor[:, start:end, end:]
    return codes[..., :k], torch.stack(scales, -1)


def search_scale(columns: Tensor, importance: Tensor) -> Tensor:
    """float16 scales [batch, n] of groups [batch, n, group].

    Of 19 scales around the one that maps the signed peak to -8, the one with the least squared error, weighted by
    `importance`, which broadcasts against the groups.
    """
    low, high = columns.amin(-1), columns.amax(-1)
    peak = torch.where(high > -low, high, low)
    best = torch.zeros_like(peak, dtype=torch.float16)
    best_error = torch.full_like(peak, torch.inf)
    for step in range(NUM_SCALES):
        scale = (peak / (-8.0 + 0.15 * (step - NUM_SCALES // 2))).to(torch.float16)
        wide = scale.float()[..., None]
        rounded = (columns * torch.where(wide == 0, 0.0, 1.0 / wide)).round_().clamp_(-8, 7).mul_(wide)
        error = rounded.sub_(columns).square_().mul_(importance).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1; H is damped, more if that is not enough.

    Args:
        hessian: [batch, k, k] float32, the sum of x x^T over the inputs of each matrix.
    Raises:
        WeightsError: a value is NaN or infinite.
    """
    if not bool(hessian.isfinite().all()):
        raise WeightsError("the calibration inputs of a layer are NaN or infinite: the model is damaged")
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    eye = torch.eye(hessian.shape[-1])
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian + (damping * mean)[..., None] * eye
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed.any()):
                return upper
    raise WeightsError("the calibration inputs of a layer cannot be inverted: use another --calibration")
