"""The distribution that one row of a table samples from."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.backend import choose
from fastsample.ops.checks import check_output, check_state
from fastsample.ops.step import StepPlan, checked_rows
from fastsample.tables import Table


def posterior(
    x: Tensor, model_out: Tensor, table: Table, row: int | Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(mean, log variance) of the Gaussian that `step` draws x' from; the columns are those of fastsample.Table.

        mean         = a*x + b*limit(p*x + q*m) + d*m
        log_variance = 2 (g0 + g1*v) + 2 log s

    In a row with s = 0 that has a variance all the same, DDPM's last one, it is 2 (g0 + g1*v): what the likelihood of
    the data is computed with. The mean is one pass, 12 bytes an element in float32; a learned variance is another of 8.

    Args:
        x: the state, shape (B, ...), float32; float64 with the reference backend. Any strides.
        model_out: the model's output for x, of its shape, or (B, 2C, ...) where x is (B, C, ...): the second half is v.
        table: the sampler's coefficients, such as DDPM(schedule, variance="learned_range").table.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,) on
            the CPU for one row per sample: len(table) - 1 - t where the table visits all timesteps t.
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
    check_state(x)
    check_output(model_out, x, guided=False)
    rows, row = checked_rows(row, table, len(x))
    visited = np.array([row]) if rows is None else rows.numpy()
    s, g0, g1 = (column[visited] for column in (table.s, table.g0, table.g1))
    for bad, why in (
        ((s == 0) & (g0 == 0) & (g1 == 0), "is deterministic: it has no variance"),
        ((table.c1 != 0)[visited] | (table.c2 != 0)[visited], "reads the x0 of earlier rows"),
        ((g1 != 0) & (model_out.shape == x.shape), "reads a learned variance: model_out must have twice x's axis 1"),
    ):
        if bad.any():
            raise ValueError(f"row {visited[bad.argmax()]} {why}")
    differentiable = torch.is_grad_enabled() and (x.requires_grad or model_out.requires_grad)
    chosen = choose(backend, x.device, native=x.dtype is torch.float32 and not differentiable)
    mean = StepPlan(x, _noise_free(table), rows=rows, backend=chosen)(model_out, row)
    constant = 2 * (g0 + np.log(np.abs(s), out=np.zeros_like(s), where=s != 0))
    return mean, _log_variance(x, model_out, constant, 2 * g1)


def _log_variance(x: Tensor, model_out: Tensor, constant: np.ndarray, slope: np.ndarray) -> Tensor:
    """constant + slope v in one pass, from one number or one per sample."""

    def per_sample(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

    if not slope.any():
        return per_sample(constant).expand(x.shape)
    v = model_out[:, x.shape[1] :].to(x.dtype)
    return torch.addcmul(per_sample(constant), v, per_sample(slope))


@functools.lru_cache(maxsize=16)
def _noise_free(table: Table) -> Table:
    return table.replace(s=0.0, g0=0.0, g1=0.0)
