"""The distribution that one row of a table samples from."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.address import address, check_readable
from fastsample.ops.backend import choose, cuda_module, place
from fastsample.ops.checks import check_output, check_state, checked_rows
from fastsample.ops.device_table import as_argument, decoded, packed_rows
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.memory import fresh
from fastsample.ops.noise import as_int
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan, visited_rows
from fastsample.ops.tracing import differentiable, no_compiled_gradients, outside, traced
from fastsample.tables import Table


def posterior(
    x: Tensor, model_out: Tensor, table: Table, row: int | Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(mean, log variance) of the Gaussian that `step` draws x' from; the columns are those of fastsample.Table.

        mean         = a*x + b*limit(p*x + q*m) + d*m
        log_variance = 2 (g0 + g1*v) + 2 log s

    In a row with s = 0 that has a variance all the same, DDPM's last one, it is 2 (g0 + g1*v): what the likelihood of
    the data is computed with. The mean is one pass, 12 bytes an element in float32; a learned variance adds 8, in the
    same pass on a GPU. Under torch.compile this is one registered op, as `step` is.

    Args:
        x: the state, shape (B, ...), float32; float64 with the reference backend. Any strides.
        model_out: the model's output for x, of its shape, or (B, 2C, ...) where x is (B, C, ...): the second half is v.
        table: the sampler's coefficients, such as DDPM(schedule, variance="learned_range").table.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,) on
            the CPU for one row per sample: len(table) - 1 - t where the table visits all timesteps t. One on a GPU, ()
            or (B,), is not read by the host: every row of the table must have a variance then.
        backend: see fastsample.backends(). Gradients and float64 are served by the reference alone.

    Returns:
        Two tensors of x's shape and dtype. A variance that the model does not tell is an expanded view of one number
        per row: clone it before writing into it.

    Raises:
        ValueError: for a wrong shape, device or row, a row that is deterministic (s = g0 = g1 = 0), one that reads the
            x0 of earlier rows, and a model_out without the variance half that a row reads.
        TypeError: for a wrong dtype.

    Example:
        >>> table = Table([500, 0], a=0.5, s=[0.1, 0.0], g0=-1.0)
        >>> mean, log_variance = posterior(torch.ones(1, 2), torch.zeros(1, 2), table, 1)
        >>> mean, log_variance
        (tensor([[0.5000, 0.5000]]), tensor([[-2., -2.]]))
    """
    for name, tensor in (("x", x), ("model_out", model_out)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    if traced(x, model_out):
        if not differentiable(x, model_out):
            rows, shared = (row, 0) if isinstance(row, Tensor) else (None, as_int("row", row))
            arguments = as_argument(table, x.device), shared, rows, any(table.learned), backend
            mean, log_variance = torch.ops.fastsample.posterior(x, model_out, *arguments)
            return mean, log_variance.expand(x.shape)
        no_compiled_gradients("posterior")
    mean, log_variance = _posterior(x, model_out, table, row, backend)
    return mean, log_variance if log_variance.shape == x.shape else log_variance.expand(x.shape)


def _posterior(x: Tensor, m: Tensor, table: Table, row: int | Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """The mean, and the log variance where the model tells it, else one number per sample or for all."""
    check_state(x)
    check_output(m, x, guided=False, name="model_out")
    for name, tensor in (("x", x), ("model_out", m)):
        check_readable(name, tensor)
    rows, row = checked_rows(row, table, x)
    of_rows = _of_rows(table)
    blind = rows is not None and not rows.is_cpu
    visited = (of_rows.worst,) if blind else visited_rows(rows, row)
    learned = of_rows.any_learned if blind else False
    for k in visited:
        refusal = of_rows.refusals[k]
        if of_rows.slopes[k] != 0:
            learned = True
            refusal = refusal or (_NEEDS_VARIANCE if m.shape == x.shape else "")
        if refusal:
            raise ValueError(f"row {k} {refusal}")
    chosen = choose(backend, x.device, native=x.dtype is torch.float32 and not differentiable(x, m))
    # Dynamic thresholds are a reduction of the step.
    if chosen in ("cuda", "triton") and not table.thresholded:
        return _in_one_pass(x, m, table, rows, row, learned, chosen)
    mean = StepPlan(Operands(x, of_rows.noise_free, rows=rows), chosen, short_cuts=False)(m, row)
    each = (1,) * (x.ndim - 1)
    if rows is None:
        constant = torch.full((1, *each), of_rows.constants[row], dtype=x.dtype, device=x.device)
        slope = torch.full_like(constant, of_rows.slopes[row]) if learned else None
    else:
        constant, slope = (one.reshape(-1, *each) for one in _at(rows, table, x))
    return mean, constant if slope is None or not learned else _plus_variance(constant, slope, m[:, x.shape[1] :].to(x))


def _plus_variance(constant: Tensor, slope: Tensor, v: Tensor) -> Tensor:
    """constant + slope v; v does not matter where its slope is 0, a NaN included."""
    return torch.addcmul(constant, torch.where(slope == 0, 0.0, v), slope)


_NEEDS_VARIANCE = "reads a learned variance: model_out must have twice x's axis 1"


class _Rows(NamedTuple):
    """What posteriors need to know of a table's rows.

    Attributes:
        constants, slopes: log variance = constant + slope v.
        refusals: why a row has no posterior, empty where it has one.
        any_learned: whether any slope is not 0.
        worst: a row that is refused where any is, else one that is learned where any is.
        noise_free: the same rows without noise.
    """

    constants: tuple[float, ...]
    slopes: tuple[float, ...]
    refusals: tuple[str, ...]
    any_learned: bool
    worst: int
    noise_free: Table


def _of_rows(table: Table) -> _Rows:
    return table.derived("posterior", _made_of_rows)


def _made_of_rows(table: Table) -> _Rows:
    constant = 2 * (table.g0 + np.log(np.abs(table.s), out=np.zeros(len(table)), where=table.s != 0))
    none = (table.s == 0) & (table.g0 == 0) & (table.g1 == 0)
    recalls = (table.c1 != 0) | (table.c2 != 0)
    reasons = np.where(
        none, "is deterministic: it has no variance", np.where(recalls, "reads the x0 of earlier rows", "")
    )
    slopes = 2 * table.g1
    return _Rows(
        tuple(constant.tolist()),
        tuple(slopes.tolist()),
        tuple(reasons.tolist()),
        any(table.learned),
        worst=int(np.argmax(2 * (none | recalls) + (slopes != 0))),
        noise_free=table.replace(s=0.0, g0=0.0, g1=0.0),
    )


def _at(rows: Tensor, table: Table, x: Tensor) -> tuple[Tensor, Tensor]:
    """(constants, slopes) of these rows, beside x and in its dtype; NaN for rows that do not exist."""

    def make(table: Table) -> Tensor:
        with outside():
            numbers = torch.tensor(_of_rows(table)[:2], dtype=torch.float64, device="cpu")
            return numbers.to(x.device, x.dtype)

    both = table.derived(("posterior", x.device, x.dtype), make)
    own = rows.to(x.device)
    constant, slope = both[:, own % len(table)].unbind()
    if not rows.is_cpu:  # checked_rows has not read them
        constant = constant.masked_fill((own < -len(table)) | (own >= len(table)), math.nan)
    return constant, slope


def _in_one_pass(
    x: Tensor, m: Tensor, table: Table, rows: Tensor | None, row: int, learned: bool, backend: str
) -> tuple[Tensor, Tensor]:
    device, batch = x.device, x.shape[0]
    x, m = (one.contiguous().resolve_neg() for one in (x, m))
    m = m if m.dtype in DTYPE_CODES else m.float()
    size, stride = x.numel() // batch, m.numel() // batch
    if rows is None:
        of_rows = _of_rows(table)
        constant = torch.full((batch,), of_rows.constants[row], dtype=torch.float32, device=device)
        slope = torch.full_like(constant, of_rows.slopes[row]) if learned else constant  # then it is not read
    else:
        rows = rows.to(device)
        constant, slope = _at(rows, table, x)
    mean = fresh(x.shape, torch.float32, device)
    log_variance = fresh(x.shape, torch.float32, device) if learned else None
    coefficients = packed_rows(table, device)
    if backend == "triton":
        from fastsample.kernels import posterior as kernel

        kernel.posterior(
            coefficients, rows, row, x, m, stride, constant, slope if learned else None, mean, log_variance
        )
    else:
        index, stream = place(device)
        cuda_module().posterior(
            *(address("table", coefficients), len(table), address("row", rows), row, batch, size),
            *(address("x", x), address("model_out", m), stride, DTYPE_CODES[m.dtype]),
            *(address("constant", constant), address("slope", slope)),
            *(address("mean", mean), address("log_variance", log_variance), stream, index),
        )
    if log_variance is None:
        log_variance = constant.reshape(-1, *(1,) * (x.ndim - 1))
    return mean, log_variance


@torch.library.custom_op("fastsample::posterior", mutates_args=())
def _registered(
    x: Tensor, m: Tensor, table: Tensor, row: int, rows: Tensor | None, learned: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    mean, log_variance = _posterior(x, m, decoded(table), row if rows is None else rows, backend)
    shape = x.shape if learned else (x.shape[0], *(1,) * (x.ndim - 1))
    return mean.contiguous(), log_variance.expand(shape).contiguous()


@_registered.register_fake
def _shapes(
    x: Tensor, m: Tensor, table: Tensor, row: int, rows: Tensor | None, learned: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if learned else (x.shape[0], *(1,) * (x.ndim - 1)))
