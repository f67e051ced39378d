"""What a step needs to know of whole samples: the factor of guidance rescale and the bound of dynamic thresholding.

Plain torch, the specification; csrc/cpu/reductions.inl is the fast version, which the step calls itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops.step.box import box_of
from fastsample.tables import Table


def rescale_factor(m: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """phi std(m_c) / std(m) + 1 - phi per sample, 1 where m is constant; shape (B, 1, ...).

    Lin et al. 2023, section 3.4, as diffusers' rescale_noise_cfg, which divides by 0 where m is constant.
    """
    of_m, of_conditional = (one.reshape(len(one), -1).std(dim=1, correction=0) for one in (m, conditional))
    constant = of_m == 0
    factor = torch.where(constant, 1.0, phi * of_conditional / torch.where(constant, 1.0, of_m) + (1 - phi))
    return per_sample(factor, m)


def threshold(x0: Tensor, quantile: float, limit: float) -> Tensor:
    """r = clamp(quantile of |x0|, 1, limit) per sample, shape (B, 1, ...), with torch.quantile's interpolation.

    Saharia et al. 2022, appendix; as diffusers' `_threshold_sample`. NaN where x0 holds one, where torch.quantile gives
    one (between a finite number and an infinity, at more than half of the way) and where r would be infinite.
    """
    found = torch.quantile(x0.abs().reshape(len(x0), -1), quantile, dim=1).clamp(1, limit)
    found = torch.where(found == math.inf, math.nan, found)
    return per_sample(found, x0)


def limited(x0: Tensor, table: Table, row: int) -> Tensor:
    """x0 as a row limits it: clamped to [-limit, limit] or to the table's box, or by a dynamic threshold."""
    limit, quantile = float(table.limit[row]), float(table.quantile[row])
    low, high = box_of(table, x0)
    if low is not None and high is not None and not math.isinf(limit):
        return torch.minimum(torch.maximum(x0, low), high)
    if quantile > 0:
        r = threshold(x0, quantile, limit)
        return torch.minimum(torch.maximum(x0, -r), r) / r
    return x0.clamp(-limit, limit)
