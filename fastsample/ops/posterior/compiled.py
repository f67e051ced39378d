"""The posterior as torch.compile, exports and recorders see it: a registered op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.device_table import as_argument, decoded
from fastsample.ops.noise import as_int
from fastsample.ops.posterior.launch import posterior_once
from fastsample.tables import Table


@torch.library.custom_op("fastsample::posterior", mutates_args=())
def _registered(
    x: Tensor, m: Tensor, table: Tensor, row: int, rows: Tensor | None, learned: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    mean, log_variance = posterior_once(x, m, decoded(table), row if rows is None else rows, backend)
    shape = x.shape if learned else (x.shape[0], *(1,) * (x.ndim - 1))
    return mean.contiguous(), log_variance.expand(shape).contiguous()


@_registered.register_fake
def _shapes(
    x: Tensor, m: Tensor, table: Tensor, row: int, rows: Tensor | None, learned: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if learned else (x.shape[0], *(1,) * (x.ndim - 1)))


def traced_posterior(
    x: Tensor, m: Tensor, table: Table, row: int | Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`posterior_once` through a registered op."""
    rows = (0, row) if isinstance(row, Tensor) else (as_int("row", row), None)
    arguments = as_argument(table, x.device), *rows, any(table.learned), backend
    mean, log_variance = torch.ops.fastsample.posterior(x, m, *arguments)
    return mean, log_variance.expand(x.shape)
