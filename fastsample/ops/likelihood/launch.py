"""The likelihood on the backend that serves the call; the caller has checked the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.backend import choose
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.likelihood.reference import likelihood_reference


def likelihood_of_rows(
    x_start: Tensor,
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    rows: Tensor | None,
    row: int,
    backend: str | None,
    *,
    native: bool = True,
) -> Tensor:
    """`likelihood` of samples at these rows, or at one; native: whether compiled kernels can serve it at all."""
    if choose(backend, x.device, native=native, offers=("triton",), op="likelihood") == "triton":
        return _on_triton(x_start, x, model_output, coefficients, rows, row)
    return likelihood_reference(x_start, x, model_output, coefficients, row if rows is None else rows.to(x.device))


def _on_triton(
    x_start: Tensor, x: Tensor, model_output: Tensor, coefficients: Tensor, rows: Tensor | None, row: int
) -> Tensor:
    from fastsample.kernels import likelihood as kernel

    if model_output.dtype not in DTYPE_CODES:
        model_output = model_output.float()
    x_start, x, model_output = (operand.resolve_neg().contiguous() for operand in (x_start, x, model_output))
    rows = None if rows is None else rows.to(x.device)
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    kernel.likelihood(coefficients, rows, row, x_start, x, model_output, out)
    return out
