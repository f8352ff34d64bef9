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
from stepflash.kernels.formats import search_scale

DAMPING = 0.01  # of the mean diagonal, as in the paper: H of few tokens is singular


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
    # A column of the matrices is contiguous here: [batch, k, n].
    left = F.pad(weight.float(), (0, padding)).transpose(1, 2).contiguous()
    if padding:
        factor = F.pad(factor, (0, padding, 0, padding))
        factor.diagonal(dim1=1, dim2=2)[:, k:] = 1.0
    importance = factor.diagonal(dim1=1, dim2=2).square().reciprocal()  # [batch, k]
    codes = torch.empty_like(left, dtype=torch.int8)
    scales = []
    for start in range(0, left.shape[1], group):
        end = start + group
        columns = left[:, start:end]
        scale = search_scale(columns.transpose(1, 2), importance[:, None, start:end])  # [batch, n]
        scales.append(scale)
        wide = scale.float()
        inverse = torch.where(wide == 0, 0.0, 1.0 / wide)
        errors = torch.empty_like(columns)
        block = factor[:, start:end, start:end]
        for j in range(group):
            code = (columns[:, j] * inverse).round_().clamp_(-8, 7)
            codes[:, start + j] = code.to(torch.int8)
            errors[:, j] = (columns[:, j] - code * wide) / block[:, j, j, None]
            columns[:, j + 1 :].addcmul_(block[:, j, j + 1 :, None], errors[:, None, j], value=-1)
        left[:, end:].baddbmm_(factor[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    return codes[:, :k].transpose(1, 2).contiguous(), torch.stack(scales, -1)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1; H is damped, more if that is not enough.

    H = R R^T with an upper R comes from the Cholesky factor of H with rows and columns reversed, and U = R^-1:
    half the work of inverting H and factorising the inverse.

    Args:
        hessian: [batch, k, k] float32, the sum of x x^T over the inputs of each matrix.
    Raises:
        WeightsError: a value is NaN or infinite.
    """
    if not bool(hessian.isfinite().all()):
        raise WeightsError("the calibration inputs of a layer are NaN or infinite: the model is damaged")
    mean = hessian.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(1e-12)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian.flip(1, 2)
        damped.diagonal(dim1=1, dim2=2).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return _inverse_upper(lower.flip(1, 2))
    raise WeightsError("the calibration inputs of a layer cannot be inverted: use another --calibration")


def _inverse_upper(matrix: Tensor) -> Tensor:
    """Inverse of upper triangular matrices [batch, k, k], by halves, so that nearly all of it is matrix products."""
    k = matrix.shape[-1]
    if k <= 256:
        inverse: Tensor = torch.linalg.solve_triangular(matrix, torch.eye(k), upper=True)
        return inverse
    half = k // 2
    out = torch.zeros_like(matrix)
    first = out[:, :half, :half] = _inverse_upper(matrix[:, :half, :half])
    last = out[:, half:, half:] = _inverse_upper(matrix[:, half:, half:])
    out[:, :half, half:] = (first @ matrix[:, :half, half:] @ last).neg_()
    return out
