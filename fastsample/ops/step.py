"""The sampling step: one pass over memory for one row of a sampler's table."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.backend import choose, mark_written
from fastsample.ops.checks import check_memory, check_state
from fastsample.ops.noise import Seed, sample_seeds
from fastsample.ops.step_plan import StepPlan, visited_rows
from fastsample.tables import Table


def step(
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int | Tensor,
    *,
    noise: Tensor | None = None,
    seed: Seed | None = None,
    guidance: float | Sequence[float] | Tensor | None = None,
    guidance_rescale: float = 0.0,
    history: Sequence[Tensor] = (),
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    input_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One row of a table applied to a batch; the columns are those of fastsample.Table.

        m  = m_u + w (m_c - m_u), times phi std(m_c) / std(m) + 1 - phi      where there is guidance
        x0 = limit(p*x + q*m)
        x' = a*x + b*x0 + c1*h1 + c2*h2 + d*m + s*exp(g0 + g1*v)*z           e^(g1 v) kept within 2^-126 and 2^127
        u' = e' x'                                                           e' of the next row

    One pass: x, m, its unconditional half under guidance, its variance half where g1 is not 0 and each history that the
    row uses are read once, x' is written once, 4 bytes an element each in float32 and 2 for a half-precision m; x0_out
    and input_out (once or twice x) add their own size. Guidance rescale reads both halves of m once more, dynamic
    thresholding x and m, and it writes |x0| and reads that four or five times. Arithmetic is float32 whatever the dtype
    of m. An operand whose coefficient is 0 is not read.

    Args:
        x: the state, shape (B, ...), float32; float64 with the reference backend. Any strides.
        model_output: m, of x's shape, or (B, 2C, ...) where x is (B, C, ...): the second half is the variance half v.
            Under guidance twice as many samples, first the B unconditional ones; v is then the conditional half's. Any
            floating dtype; float32, float16 and bfloat16 are converted in registers.
        table: the sampler's coefficients.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,) on
            the CPU lets samples be at different rows.
        noise: z, of x's shape and dtype. Not read where s = 0.
        seed: instead of `noise`, z = randn(x.shape, seed=seed, step=row, stream=1), drawn inside the pass.
        guidance: w, a number or one per sample; None where the model was called without.
        guidance_rescale: phi in [0, 1].
        history: the x0 of the last row (h1) and of the one before (h2), of x's shape and dtype.
        out: receives x'; may be x. Otherwise x' is a fresh tensor.
        x0_out: receives x0; of x's dtype. May be one of `history`.
        input_out: receives u', the next model input, in any floating dtype; with twice x's batch it is written twice.
        backend: see fastsample.backends(). Gradients and float64 are served by the reference alone.

    Returns:
        x' (`out` where given).

    Raises:
        ValueError: for a wrong shape, device or row, for history or a variance half that is needed and absent, and
            where s > 0 unless exactly one of noise and seed is given. TypeError: for a dtype that does not fit. Nothing
            is written before.

    Example:
        >>> table = Table([500], p=1.0, q=-1.0, b=0.5, limit=1.0)
        >>> step(torch.full((1, 3), 4.0), torch.zeros(1, 3), table, 0)
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    for name, tensor in (("x", x), ("model_output", model_output)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    check_state(x)
    rows, row = checked_rows(row, table, len(x))
    noisy = [k for k in visited_rows(rows, row) if table.stochastic[k]]
    if noisy and (noise is None) == (seed is None):
        raise ValueError(f"row {noisy[0]} adds noise: give exactly one of noise= and seed=")
    if len(history) > 2:
        raise ValueError(f"history holds the x0 of at most 2 earlier rows, got {len(history)}")
    outputs = {"out": out, "x0_out": x0_out, "input_out": input_out}
    inputs = {"x": x, "model_output": model_output, "noise": noise}
    check_memory({**inputs, **{f"history[{i}]": one for i, one in enumerate(history)}}, outputs)
    weights = None if guidance is None else guidance_weights(guidance, x)
    if weights is not None and len(model_output) != 2 * len(x):
        raise ValueError(
            f"under guidance model_output has the unconditional and the conditional half, {2 * len(x)} samples; "
            f"got shape {tuple(model_output.shape)}"
        )
    if weights is None and guidance_rescale != 0:
        raise ValueError("guidance_rescale needs guidance=")
    differentiable = torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (x, model_output, noise, weights, *history)
    )
    chosen = choose(backend, x.device, native=x.dtype is torch.float32 and not differentiable)
    plan = StepPlan(
        x,
        table,
        seeds=None if seed is None else sample_seeds(seed, len(x)),
        guidance=weights,
        rescale=guidance_rescale,
        history=history,
        rows=rows,
        out=out,
        x0_out=x0_out,
        input_out=input_out,
        backend=chosen,
    )
    result = plan(model_output, row, noise)
    for written in outputs.values():
        if written is not None:
            mark_written(written)
    return result


def checked_rows(row: int | Tensor, table: Table, batch: int) -> tuple[Tensor | None, int]:
    """(rows of the samples or None, the row they share else 0), negative ones counted from the end."""
    if isinstance(row, Tensor) and row.ndim > 0:
        if row.dtype != torch.int64 or not row.is_cpu:
            raise TypeError(f"row must be an int or an int64 tensor on the CPU, got {row.dtype} on {row.device}")
        if row.shape != (batch,):
            raise ValueError(f"row must be one int or {batch}, one per sample; got shape {tuple(row.shape)}")
        if not ((row >= -len(table)) & (row < len(table))).all():
            raise ValueError(f"rows {row.tolist()} are not all inside a table of {len(table)} rows")
        return row % len(table), 0
    try:
        shared = operator.index(row)
    except TypeError:
        raise TypeError(f"row must be an int or an int64 tensor on the CPU, got {row!r}") from None
    if not -len(table) <= shared < len(table):
        raise ValueError(f"row {row} is outside a table of {len(table)} rows")
    return None, shared % len(table)


def guidance_weights(guidance: float | Sequence[float] | Tensor, x: Tensor) -> Tensor:
    """One guidance weight per sample, in x's dtype on its device."""
    try:
        weights = torch.as_tensor(guidance, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"guidance must be a number or one per sample, got {guidance!r}") from None
    if weights.shape not in ((), (x.shape[0],)):
        raise ValueError(f"guidance must be one number or {x.shape[0]}, one per sample; got {tuple(weights.shape)}")
    if not weights.isfinite().all():
        raise ValueError(f"guidance must be finite, got {guidance}")
    # A copy: the caller may change his own later.
    return torch.empty(x.shape[0], dtype=x.dtype, device=x.device).copy_(weights)
