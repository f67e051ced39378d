"""The likelihood as torch.compile, exports and recorders see it: a registered op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.likelihood.launch import likelihood_of_rows


@torch.library.custom_op("fastsample::likelihood", mutates_args=())
def _registered(
    x_start: Tensor,
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    rows: Tensor | None,
    row: int,
    backend: str | None,
) -> Tensor:
    if rows is not None:
        rows = rows.to(x.device).expand(x.shape[0]).contiguous()
    return likelihood_of_rows(x_start, x, model_out, coefficients, rows, row, backend)


@_registered.register_fake
def _one_per_sample(x_start: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


def traced_likelihood(
    x_start: Tensor, x: Tensor, model_out: Tensor, coefficients: Tensor, row: int | Tensor, backend: str | None
) -> Tensor:
    """`likelihood_of_rows` through a registered op."""
    rows, shared = (row, 0) if isinstance(row, Tensor) else (None, row)
    result: Tensor = torch.ops.fastsample.likelihood(x_start, x, model_out, coefficients, rows, shared, backend)
    return result
