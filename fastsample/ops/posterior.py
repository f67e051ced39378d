"""The distribution that one row of a table samples from."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.backend import choose, cuda_module, fresh, place, recorded
from fastsample.ops.checks import check_output, check_state, checked_rows, differentiable, no_compiled_gradients
from fastsample.ops.device_table import decoded, encoded, packed_rows
from fastsample.ops.noise import as_int
from fastsample.ops.step_launch import DTYPE_CODES
from fastsample.ops.step_plan import StepPlan, visited_rows
from fastsample.schedule import Float64Array
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
    if recorded(x, model_out):
        if not differentiable(x, model_out):
            rows, shared = (row, 0) if isinstance(row, Tensor) else (None, as_int(row))
            arguments = encoded(table, x.device), shared, rows, any(table.learned), backend
            mean, log_variance = torch.ops.fastsample.posterior(x, model_out, *arguments)
            return mean, log_variance.expand(x.shape)
        no_compiled_gradients("posterior")
    mean, log_variance = _posterior(x, model_out, table, row, backend)
    return mean, log_variance.expand(x.shape)


def _posterior(x: Tensor, m: Tensor, table: Table, row: int | Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """The mean, and the log variance where the model tells it, else one number per sample or for all."""
    check_state(x)
    check_output(m, x, guided=False)
    rows, row = checked_rows(row, table, x)
    visited = np.array(range(len(table)) if rows is not None and not rows.is_cpu else visited_rows(rows, row))
    s, g0, g1 = (column[visited] for column in (table.s, table.g0, table.g1))
    for bad, why in (
        ((s == 0) & (g0 == 0) & (g1 == 0), "is deterministic: it has no variance"),
        ((table.c1 != 0)[visited] | (table.c2 != 0)[visited], "reads the x0 of earlier rows"),
        ((g1 != 0) & (m.shape == x.shape), "reads a learned variance: model_out must have twice x's axis 1"),
    ):
        if bad.any():
            raise ValueError(f"row {visited[bad.argmax()]} {why}")
    chosen = choose(backend, x.device, native=x.dtype is torch.float32 and not differentiable(x, m))
    learned = bool((g1 != 0).any())
    # Dynamic thresholds are a reduction of the step.
    if chosen in ("cuda", "triton") and not table.thresholded:
        return _in_one_pass(x, m, table, rows, row, learned, chosen)
    mean = StepPlan(x, _noise_free(table), rows=rows, backend=chosen)(m, row)
    constant, slope = (
        torch.from_numpy(values).to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        for values in _log_variance(table, np.array([row]) if rows is None else rows.numpy(force=True))
    )
    return mean, torch.addcmul(constant, m[:, x.shape[1] :].to(x.dtype), slope) if learned else constant


def _log_variance(table: Table, rows: np.ndarray) -> tuple[Float64Array, Float64Array]:
    """(constant, slope) of these rows: log variance = constant + slope v; NaN for rows that do not exist."""
    exist = (rows >= -len(table)) & (rows < len(table))
    s, g0, g1 = (column[np.where(exist, rows, 0)] for column in (table.s, table.g0, table.g1))
    constant = 2 * (g0 + np.log(np.abs(s), out=np.zeros_like(s), where=s != 0))
    return np.where(exist, constant, np.nan), 2 * g1


def _in_one_pass(
    x: Tensor, m: Tensor, table: Table, rows: Tensor | None, row: int, learned: bool, backend: str
) -> tuple[Tensor, Tensor]:
    device, batch = x.device, x.shape[0]
    x, m = (one.contiguous().resolve_neg() for one in (x, m))
    m = m if m.dtype in DTYPE_CODES else m.float()
    size, stride = x.numel() // batch, m.numel() // batch
    if rows is None:
        numbers = [values.item() for values in _log_variance(table, np.array([row]))]
        constant, slope = (torch.full((batch,), value, dtype=torch.float32, device=device) for value in numbers)
    else:
        rows = rows.to(device)
        constant, slope = _on_device(table, device)[:, rows % len(table)].unbind()
        constant = constant.masked_fill((rows < -len(table)) | (rows >= len(table)), np.nan)
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
            *(coefficients.data_ptr(), len(table), 0 if rows is None else rows.data_ptr(), row, batch, size),
            *(x.data_ptr(), m.data_ptr(), stride, DTYPE_CODES[m.dtype], constant.data_ptr(), slope.data_ptr()),
            *(mean.data_ptr(), 0 if log_variance is None else log_variance.data_ptr(), stream, index),
        )
    if log_variance is None:
        log_variance = constant.reshape(-1, *(1,) * (x.ndim - 1))
    return mean, log_variance


@functools.lru_cache(maxsize=16)
def _on_device(table: Table, device: torch.device) -> Tensor:
    """The constants and slopes of all rows, float32 of shape (2, rows)."""
    with torch.inference_mode(False):
        numbers = np.stack(_log_variance(table, np.arange(len(table))))
        return torch.from_numpy(numbers).to(device, torch.float32)


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


@functools.lru_cache(maxsize=16)
def _noise_free(table: Table) -> Table:
    return table.replace(s=0.0, g0=0.0, g1=0.0)
