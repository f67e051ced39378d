"""The log density of what a step draws: -z^2 / 2 - log(s e^(g0 + g1 v)) - log(2 pi) / 2, summed over a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsample.ops.device_table import packed_rows
from fastsample.ops.tracing import differentiable
from fastsample.tables import ROW, Table

LN_2 = math.log(2)
_S = ROW.index("s")


def log_prob_of_sums(sums: Tensor, size: int, table: Table, row: int, rows: Tensor | None) -> Tensor:
    """Of each sample, float64 (B,), from what a kernel leaves; NaN in rows that draw nothing or do not exist.

    Args:
        sums: float64 (B, parts, 2), of z^2 and of g1 v / ln 2 over a part of a sample. Overwritten.
        size: elements of a sample.
        table, row, rows: the step's; `rows` on the device of the sums.
    """
    squares, exponents = _added_up(sums).unbind(1)
    return -(
        squares / 2 + exponents * LN_2 + size * (_scales(sums, table, row, rows).log() + math.log(2 * math.pi) / 2)
    )


def log_prob_reference(mean: Tensor, z: Tensor, log_sigma: Tensor | float) -> Tensor:
    """The same of x' = mean + sigma z in plain torch: x' is what it is, the mean and sigma have derivatives.

    Args:
        mean: (B, ...).
        z: like the mean.
        log_sigma: like the mean, or one number.
    """
    mean, z = mean.double(), z.detach().double()
    log_sigma = torch.as_tensor(log_sigma, dtype=torch.float64, device=mean.device)
    # (x' - mean) / sigma without the cancellation: z, to which the rest adds 0.
    if differentiable(mean):
        z = z + (mean.detach() - mean) * torch.exp(-log_sigma)
    if differentiable(log_sigma):
        z = z * torch.exp(log_sigma.detach() - log_sigma)
    density = -(z * z / 2 + log_sigma + math.log(2 * math.pi) / 2)
    return density.reshape(len(density), -1).sum(1)


def _added_up(sums: Tensor) -> Tensor:
    """The sum over parts, in an order that neither the batch nor the device decides."""
    while (parts := sums.shape[1]) > 1:
        upper = parts // 2
        sums[:, :upper] += sums[:, parts - upper :]
        sums = sums[:, : parts - upper]
    return sums[:, 0]


def _scales(sums: Tensor, table: Table, row: int, rows: Tensor | None) -> Tensor:
    """s e^g0 of each sample, as kernels have it; NaN where there is none."""
    if rows is None:
        return torch.full((), float(table.packed[row, _S]), dtype=sums.dtype, device=sums.device)
    exists = (rows >= -len(table)) & (rows < len(table))
    scales = packed_rows(table, sums.device)[:, _S][torch.where(exists, rows, 0)].to(sums.dtype)
    return torch.where(exists & (scales > 0), scales, math.nan)
