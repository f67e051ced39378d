"""The likelihood as torch.compile, exports and recorders see it: a registered op, which checks rows when it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.checks import checked_rows
from fastsample.ops.likelihood.launch import likelihood_of_rows


@torch.library.custom_op("fastsample::likelihood", mutates_args=())
def _registered(
    x_start: Tensor,
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    rows: Tensor | None,
    row: int,
    backend: str | None,
) -> Tensor:
    rows, shared = checked_rows(row if rows is None else rows, coefficients, x)
    return likelihood_of_rows(x_start, x, model_output, coefficients, rows, shared, backend)


@_registered.register_fake
def _one_per_sample(x_start: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


def traced_likelihood(
    x_start: Tensor, x: Tensor, model_output: Tensor, coefficients: Tensor, row: int | Tensor, backend: str | None
) -> Tensor:
    """`likelihood_of_rows` through a registered op."""
    rows, shared = (row, 0) if isinstance(row, Tensor) else (None, row)
    result: Tensor = torch.ops.fastsample.likelihood(x_start, x, model_output, coefficients, rows, shared, backend)
    return result
