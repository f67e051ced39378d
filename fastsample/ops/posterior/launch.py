"""The posterior on the backend that serves the call, after a check that the rows have one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops.address import address, check_readable
from fastsample.ops.backend import choose, cuda_module, place
from fastsample.ops.checks import check_output, check_state, checked_rows
from fastsample.ops.device_table import packed_rows
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.memory import fresh
from fastsample.ops.posterior.reference import log_variance, posterior_reference
from fastsample.ops.posterior.rows import rows_of, variance_of
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan, visited_rows
from fastsample.ops.tracing import differentiable
from fastsample.tables import Table

_NEEDS_VARIANCE = "reads a learned variance: model_output must have twice x's axis 1"


def posterior_once(x: Tensor, m: Tensor, table: Table, row: int | Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """(mean, log variance); a log variance that the model does not tell is one number per sample or for all."""
    check_state(x)
    check_output(m, x, guided=False)
    for name, tensor in (("x", x), ("model_output", m)):
        check_readable(name, tensor)
    rows, row = checked_rows(row, table, x)
    learned = _learned(m, x, table, rows, row)
    backend = choose(backend, x.device, native=x.dtype is torch.float32 and not differentiable(x, m))
    if backend == "reference":
        return posterior_reference(x, m, table, row if rows is None else rows)
    # Dynamic thresholds are a reduction of the step, and the bounds of a box are operands of it.
    if backend == "cpu" or table.thresholded or table.box is not None:
        mean = StepPlan(Operands(x, rows_of(table).noise_free, rows=rows), backend, short_cuts=False)(m, row)
        return mean, log_variance(x, m, table, row if rows is None else rows, learned=learned)
    return _in_one_pass(x, m, table, rows, row, learned, backend)


def _learned(m: Tensor, x: Tensor, table: Table, rows: Tensor | None, row: int) -> bool:
    """Whether the model tells the variance of any of these rows; raises for a row that has no posterior."""
    posterior_rows = rows_of(table)
    on_device = rows is not None and not rows.is_cpu
    learned = posterior_rows.any_learned if on_device else False
    for k in (posterior_rows.first_to_check,) if on_device else visited_rows(rows, row):
        refusal = posterior_rows.refusals[k]
        if posterior_rows.slopes[k] != 0:
            learned = True
            refusal = refusal or (_NEEDS_VARIANCE if m.shape == x.shape else "")
        if refusal:
            raise ValueError(f"row {k} {refusal}")
    return learned


def _in_one_pass(
    x: Tensor, m: Tensor, table: Table, rows: Tensor | None, row: int, learned: bool, backend: str
) -> tuple[Tensor, Tensor]:
    device, batch = x.device, x.shape[0]
    x, m = (operand.contiguous().resolve_neg() for operand in (x, m))
    m = m if m.dtype in DTYPE_CODES else m.float()
    size, stride = x.numel() // batch, m.numel() // batch
    if rows is None:
        posterior_rows = rows_of(table)
        constant = torch.full((batch,), posterior_rows.constants[row], dtype=torch.float32, device=device)
        slope = torch.full_like(constant, posterior_rows.slopes[row]) if learned else constant  # then it is not read
    else:
        rows = rows.to(device)
        constant, slope = variance_of(rows, table, x)
    mean = fresh(x.shape, torch.float32, device)
    variance = fresh(x.shape, torch.float32, device) if learned else None
    packed = packed_rows(table, device)
    if backend == "triton":
        from fastsample.kernels import posterior as kernel

        kernel.posterior(packed, rows, row, x, m, stride, constant, slope if learned else None, mean, variance)
    else:
        index, stream = place(device)
        cuda_module().posterior(
            *(address("table", packed), len(table), address("row", rows), row, batch, size),
            *(address("x", x), address("model_output", m), stride, DTYPE_CODES[m.dtype]),
            *(address("constant", constant), address("slope", slope)),
            *(address("mean", mean), address("log_variance", variance), stream, index),
        )
    return mean, per_sample(constant, x) if variance is None else variance
