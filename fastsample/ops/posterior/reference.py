"""The posterior in plain torch: the specification of every backend's kernel, and what gradients go through."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops.posterior.rows import rows_of, variance_of
from fastsample.ops.step.reference import step_reference
from fastsample.tables import Table


def posterior_reference(x: Tensor, m: Tensor, table: Table, row: int | Tensor) -> tuple[Tensor, Tensor]:
    """(mean, log variance) of one row, or of a row (B,) per sample; differentiable, in x's dtype.

    The mean is the step without noise. The log variance has x's shape where the model tells it in any row that is
    visited (in any of the table, where `row` lies on a GPU), else one number for all or per sample.
    """
    posterior_rows = rows_of(table)
    mean = step_reference(x, m, posterior_rows.noise_free, row).state
    if isinstance(row, Tensor):
        learned = any(posterior_rows.slopes[k] != 0 for k in row.tolist()) if row.is_cpu else posterior_rows.any_learned
    else:
        learned = posterior_rows.slopes[row] != 0
    return mean, log_variance(x, m, table, row, learned=learned)


def log_variance(x: Tensor, m: Tensor, table: Table, row: int | Tensor, *, learned: bool) -> Tensor:
    """constant + slope v; where the slope is 0 no v matters, not even NaN."""
    if isinstance(row, Tensor):
        constant, slope = (per_sample(values, x) for values in variance_of(row, table, x))
    else:
        posterior_rows = rows_of(table)
        constant = torch.full((1,) * x.ndim, posterior_rows.constants[row], dtype=x.dtype, device=x.device)
        slope = torch.full_like(constant, posterior_rows.slopes[row]) if learned else constant  # then it is not read
    if not learned:
        return constant
    v = m[:, x.shape[1] :].to(x)
    return torch.addcmul(constant, torch.where(slope == 0, 0.0, v), slope)
