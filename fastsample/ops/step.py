"""The sampling step: one pass over memory for one row of a sampler's table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsample.ops.backend import _cpu, choose
from fastsample.ops.noise import STEP, Seed, randn, sample_seeds
from fastsample.tables import Table

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/cpu/kernels.h, DType


def step(
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int,
    *,
    noise: Tensor | None = None,
    seed: Seed | None = None,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    input_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One row of a table applied to a batch, with coefficients and columns as in fastsample.Table:

        x0 = clamp(p*x + q*m, -limit, limit)
        x' = a*x + b*x0 + d*m + s*z

    Reads x and m once and writes x' once: 12 bytes an element in float32, 10 with a half-precision m; x0_out and input_out
    add what they hold. Arithmetic is float32 whatever the dtype of m. An operand whose coefficient is 0 is not read.

    Args:
        x: the state, shape (B, ...), float32 (float64 with the reference backend).
        model_output: m, of x's shape, or (B, 2C, ...) where x is (B, C, ...): the second half is ignored. float32, float16
            or bfloat16.
        table, row: row k of the table; negative counts from the end.
        noise: z, of x's shape and dtype. Rows with s = 0 ignore it.
        seed: instead of `noise`: z = randn(x.shape, seed=seed, step=row, stream=1), drawn inside the pass.
        out: receives x'; may be x itself. A fresh tensor otherwise.
        x0_out: receives x0.
        input_out: receives e*x' in its own dtype (float32, float16 or bfloat16), the next model input.
        backend: see fastsample.backends(). Gradients and float64 are served by the reference alone.

    Returns:
        x' (`out` where given).

    Raises:
        ValueError: for wrong shapes, devices or rows, and where s > 0 and not exactly one of noise and seed is given.
        TypeError: for tensors that are not floating point, or whose dtype does not fit. Nothing is written before.

    Example:
        >>> from fastsample import DDIM, Schedule
        >>> table = DDIM(Schedule.linear(), steps=10).table
        >>> step(torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), table, -1).shape
        torch.Size([1, 3, 8, 8])
    """
    rows = len(table)
    k = row if row >= 0 else row + rows
    if not 0 <= k < rows:
        raise ValueError(f"row {row} is outside a table of {rows} rows")
    shape = x.shape
    if len(shape) == 0 or x.numel() == 0:
        raise ValueError(f"x must have a first axis of samples and no zero, got shape {tuple(shape)}")
    halves = _halves(shape, model_output)
    stochastic = table.stochastic[k]
    if stochastic and (noise is None) == (seed is None):
        raise ValueError(f"row {k} adds noise: give exactly one of noise= and seed=")
    others = [("model_output", model_output)]
    if stochastic and noise is not None:
        others.append(("noise", noise))
    for name, tensor in (("out", out), ("x0_out", x0_out), ("input_out", input_out)):
        if tensor is not None:
            others.append((name, tensor))
    native = x.dtype is torch.float32
    for name, tensor in others:
        native &= tensor.dtype in _DTYPE_CODES
        if tensor.device != x.device:
            raise ValueError(f"{name} lies on {tensor.device}, x on {x.device}")
        if tensor is not model_output:
            if tensor.shape != shape:
                raise ValueError(f"{name} must have x's shape {tuple(shape)}, got {tuple(tensor.shape)}")
            if tensor.dtype is not x.dtype and name != "input_out":
                raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
    if not x.is_floating_point() or not model_output.is_floating_point():
        raise TypeError(f"x and model_output must be floating point, got {x.dtype} and {model_output.dtype}")
    if torch.is_grad_enabled() and (x.requires_grad or model_output.requires_grad):
        native = False
