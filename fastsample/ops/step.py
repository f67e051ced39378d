"""The sampling step: one pass over memory for one row of a sampler's table."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.backend import _cpu, choose, fresh, mark_written
from fastsample.ops.checks import check_like, check_memory, check_output, check_state
from fastsample.ops.noise import STEP, Seed, randn, sample_seeds
from fastsample.ops.reductions import limited, rescale_factor
from fastsample.tables import Table

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType in csrc/cpu/kernels.h


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
        x' = a*x + b*x0 + c1*h1 + c2*h2 + d*m + s*exp(g0 + g1*v)*z
        u' = e' x'                                                           e' of the next row

    One pass: x, m, its unconditional half under guidance, its variance half where g1 is not 0 and each history that the
    row uses are read once, x' is written once, 4 bytes an element each in float32 and 2 for a half-precision m; x0_out
    and input_out (once or twice x) add their own size. Guidance rescale reads both halves of m once more, dynamic
    thresholding x and m, and |x0| three times. Arithmetic is float32 whatever the dtype of m. An operand whose coefficient
    is 0 is not read.

    Args:
        x: the state, shape (B, ...), float32; float64 with the reference backend. Any strides.
        model_output: m, of x's shape, or (B, 2C, ...) where x is (B, C, ...): the second half is the variance half v.
            Under guidance twice as many samples, first the B unconditional ones; v is then the conditional half's. Any
            floating dtype; float32, float16 and bfloat16 are converted in registers.
        table: the sampler's coefficients.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,) on the
            CPU lets samples be at different rows.
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
        ValueError: for a wrong shape, device or row, for history or a variance half that is needed and absent, and where
            s > 0 unless exactly one of noise and seed is given. TypeError: for a dtype that does not fit. Nothing is
            written before.

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
    if any(table.stochastic[k] for k in _visited(rows, row)) and (noise is None) == (seed is None):
        raise ValueError(f"row {row} adds noise: give exactly one of noise= and seed=")
    outputs = {"out": out, "x0_out": x0_out, "input_out": input_out}
    inputs = {"x": x, "model_output": model_output, "noise": noise}
    check_memory({**inputs, **{f"history[{i}]": one for i, one in enumerate(history)}}, outputs)
    weights = None if guidance is None else guidance_weights(guidance, x)
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
    if not -len(table) <= operator.index(row) < len(table):
        raise ValueError(f"row {row} is outside a table of {len(table)} rows")
    return None, operator.index(row) % len(table)


def guidance_weights(guidance: float | Sequence[float] | Tensor, x: Tensor) -> Tensor:
    """One guidance weight per sample, in x's dtype on its device."""
    weights = torch.as_tensor(guidance, dtype=x.dtype, device=x.device)
    if weights.shape not in ((), (x.shape[0],)):
        raise ValueError(f"guidance must be one number or {x.shape[0]}, one per sample; got {tuple(weights.shape)}")
    if not weights.isfinite().all():
        raise ValueError(f"guidance must be finite, got {guidance}")
    return weights.expand(x.shape[0]).contiguous()


def _visited(rows: Tensor | None, row: int) -> Sequence[int]:
    return (row,) if rows is None else rows.unique().tolist()


class StepPlan:
    """`step` with everything but the model's output, the row and the noise fixed and checked once: what a loop calls.

    Args are those of `step`; `seeds` is an int64 tensor with one seed per sample, `guidance` a float tensor with one
    weight per sample, `rows` an int64 tensor that is read at every call or None, `backend` one that can run. Keeps the
    addresses of its tensors: their storage must not move. That x is a state, that rows exist and what overlaps, the
    caller has checked.

    Attributes:
        x0_out: as given.
    """

    def __init__(
        self,
        x: Tensor,
        table: Table,
        *,
        seeds: Tensor | None = None,
        guidance: Tensor | None = None,
        rescale: float = 0.0,
        history: Sequence[Tensor] = (),
        rows: Tensor | None = None,
        out: Tensor | None = None,
        x0_out: Tensor | None = None,
        input_out: Tensor | None = None,
        backend: str = "cpu",
    ) -> None:
        for name, tensor in (("out", out), ("x0_out", x0_out), *((f"history[{i}]", h) for i, h in enumerate(history))):
            if tensor is not None:
                check_like(name, tensor, x, dtype=x.dtype)
        if input_out is not None:
            check_like("input_out", input_out, x, dtype=None, copies=2)
            if not input_out.is_floating_point():
                raise TypeError(f"input_out must be floating point, got {input_out.dtype}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance_rescale must lie in [0, 1], got {rescale}")
        self.x0_out = x0_out
        self._x, self._table, self._seeds, self._rows = x, table, seeds, rows
        self._guidance, self._rescale, self._history = guidance, rescale, tuple(history)
        self._out, self._input_out = out, input_out
        self._native = backend == "cpu"
        if self._native:
            self._prepare()

    def _prepare(self) -> None:
        # The kernel writes packed memory of its own dtypes; any other target gets a stand-in that is copied over.
        self._stand_ins: list[tuple[Tensor, Tensor]] = []
        self._staging: Tensor | None = None
        x = self._x = self._x.contiguous().resolve_neg()
        batch, size = x.shape[0], x.numel() // x.shape[0]
        self._layouts = self._accepted_layouts(size)
        x0_address = self._address(self.x0_out)
        # Where x0 replaces the history it was made from, both must be the very same memory.
        self._history = tuple(
            one if one is self.x0_out else one.contiguous().resolve_neg() for one in self._history
        )
        histories = [x0_address if one is self.x0_out else one.data_ptr() for one in self._history]
        for target, stand_in in self._stand_ins:
            if any(target is one for one in self._history):
                stand_in.copy_(target)
        input_address = self._address(self._input_out)
        code = 0 if self._input_out is None else _DTYPE_CODES.get(self._input_out.dtype, 0)
        twice = self._input_out is not None and len(self._input_out) > batch
        weights = self._guidance
        self._out_address = self._address(self._out)
        self._kernel = _cpu.Step(
            self._table.packed_address,
            0 if self._rows is None else self._rows.data_ptr(),
            batch,
            size,
            x.data_ptr(),
            0 if self._seeds is None else self._seeds.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            weights is not None and bool((weights == weights[0]).all()),
            self._rescale,
            self._table.thresholded,
            histories[0] if histories else 0,
            histories[1] if len(histories) > 1 else 0,
            x0_address,
            input_address,
            input_address + x.numel() * (4, 2, 2)[code] if twice else 0,
            code,
        )

    def _accepted_layouts(self, size: int) -> dict[torch.Size, tuple[int, bool]]:
        """(elements from sample to sample, guided) of every shape that the model's output may have."""
        batch, *rest = self._x.shape
        layouts = {}
        for guided in (False, True) if self._guidance is not None else (False,):
            count = 2 * batch if guided else batch
            layouts[torch.Size((count, *rest))] = size, guided
            if rest:
                layouts[torch.Size((count, 2 * rest[0], *rest[1:]))] = 2 * size, guided
        return layouts

    def _address(self, target: Tensor | None) -> int:
        if target is None:
            return 0
        if target.is_contiguous() and target.dtype in _DTYPE_CODES and not target.is_neg():
            return target.data_ptr()
        dtype = target.dtype if target.dtype in _DTYPE_CODES else torch.float32
        stand_in = torch.empty(target.shape, dtype=dtype, device=target.device)
        self._stand_ins.append((target, stand_in))
        return stand_in.data_ptr()

    def __call__(
        self, m: Tensor, row: int, noise: Tensor | None = None, keep_x0: bool = True, write_input: bool = True
    ) -> Tensor:
        """x' of this row; m with twice the batch where it is guided. x0_out and input_out can be left as they are."""
        table = self._table
        if self._rows is None:
            stochastic, learned = table.stochastic[row], table.learned[row]
        else:
            visited = _visited(self._rows, row)
            stochastic, learned = (any(flags[k] for k in visited) for flags in (table.stochastic, table.learned))
        if table.history:
            self._check_history(row)
        if not self._native:
            return self._reference(m, row, noise, stochastic, keep_x0, write_input)
        layout = self._layouts.get(m.shape)
        if layout is None or not m.is_cpu:
            check_output(m, self._x, guided=self._guidance is not None)
            raise AssertionError("an output that passes the check has a layout")
        stride, guided = layout
        if learned:
            _check_variance(m, self._x)
        code = _DTYPE_CODES.get(m.dtype)
        if code is None or not m.is_contiguous() or m.is_neg():
            m = self._stage(m)
            code = _DTYPE_CODES[m.dtype]
        noise_address = 0
        if stochastic and (noise is not None or self._seeds is None):
            noise = _checked_noise(noise, self._x).contiguous().resolve_neg()
            noise_address = noise.data_ptr()
        out, address = self._out, self._out_address
        if out is None:
            out = fresh(self._x.shape, torch.float32, self._x.device)
            address = out.data_ptr()
        self._kernel(
            row,
            m.data_ptr(),
            stride,
            code,
            guided,
            noise_address,
            address,
            keep_x0,
            write_input,
            torch.get_num_threads(),
        )
        for target, stand_in in self._stand_ins:
            target.copy_(stand_in)
        return out

    def _check_history(self, row: int) -> None:
        for name, needed in (("c1", 1), ("c2", 2)):
            if len(self._history) < needed and any(getattr(self._table, name)[k] for k in _visited(self._rows, row)):
                raise ValueError(f"row {row} needs the x0 of {needed} earlier row(s): give history=")

    def _stage(self, m: Tensor) -> Tensor:
        # Kept from row to row: a model with strided or float64 outputs must not cost an allocation each time.
        check_output(m, self._x, guided=self._guidance is not None)
        dtype = m.dtype if m.dtype in _DTYPE_CODES else torch.float32
        if self._staging is None or self._staging.shape != m.shape or self._staging.dtype != dtype:
            self._staging = torch.empty(m.shape, dtype=dtype, device=m.device)
        return self._staging.copy_(m)

    def _reference(
        self, m: Tensor, row: int, noise: Tensor | None, stochastic: bool, keep_x0: bool, write_input: bool
    ) -> Tensor:
        rows = row if self._rows is None else self._rows
        z = noise if stochastic else None
        result, x0 = step_reference(
            self._x, m, self._table, rows, z, self._seeds, self._guidance, self._rescale, self._history
        )
        if self.x0_out is not None and keep_x0:
            self.x0_out.copy_(x0)
        if self._input_out is not None and write_input:
            batch = len(self._x)
            next_e = torch.from_numpy(np.append(self._table.e[1:], 1.0))[rows]
            scale = next_e.to(result).reshape(-1, *(1,) * (result.ndim - 1))
            for half in self._input_out.split(batch):
                half.copy_(result * scale)
        return result if self._out is None else self._out.copy_(result)


def step_reference(
    x: Tensor,
    m: Tensor,
    table: Table,
    row: int | Tensor,
    z: Tensor | None = None,
    seeds: Tensor | None = None,
    guidance: Tensor | None = None,
    rescale: float = 0.0,
    history: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """(x', x0) of one row in plain torch: the specification. Differentiable; computes in x's dtype."""
    check_output(m, x, guided=guidance is not None)
    if isinstance(row, Tensor) and row.ndim > 0:
        return _rows_reference(x, m, table, row.tolist(), z, seeds, guidance, rescale, history)
    row = int(row)
    conditional = m[-len(x) :].to(x.dtype)
    if table.learned[row]:
        _check_variance(m, x)
    v = conditional[:, x.shape[1] :] if x.ndim > 1 else conditional
    if conditional.shape != x.shape:
        conditional = conditional[:, : x.shape[1]]
    combined = conditional
    if len(m) > len(x):
        assert guidance is not None
        unconditional = m[: len(x)].to(x.dtype)
        unconditional = unconditional[:, : x.shape[1]] if unconditional.shape != x.shape else unconditional
        weight = guidance.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        combined = conditional + (weight - 1) * (conditional - unconditional)  # exactly conditional at 1
        if rescale != 0:
            combined = combined * rescale_factor(combined, conditional, rescale)
    if table.stochastic[row]:
        if z is None and seeds is not None:
            z = randn(x.shape, seed=seeds, step=row, stream=STEP, device=x.device).to(x.dtype)
        z = _checked_noise(z, x)
        if table.learned[row]:
            z = z * torch.exp(v * float(table.g1[row]))
    p, q, a, b, c1, c2, d = (float(getattr(table, name)[row]) for name in ("p", "q", "a", "b", "c1", "c2", "d"))
    s = float(table.s[row]) * math.exp(float(table.g0[row]))
    limit, quantile = float(table.limit[row]), float(table.quantile[row])
    h1, h2 = (*history, None, None)[:2]
    x0 = _sum((p, x), (q, combined))
    if math.isinf(limit) and quantile == 0:
        # Folded before rounding: at high noise p is in the thousands and x0 would lose what x' still has.
        result = _sum((b * q + d, combined), (a + b * p, x), (c1, h1), (c2, h2), (s, z))
    else:
        x0 = limited(x0, limit, quantile)
        result = _sum((d, combined), (b, x0), (a, x), (c1, h1), (c2, h2), (s, z))
    return result, x0


def _rows_reference(
    x: Tensor,
    m: Tensor,
    table: Table,
    rows: list[int],
    z: Tensor | None,
    seeds: Tensor | None,
    guidance: Tensor | None,
    rescale: float,
    history: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    def alone(i: int) -> tuple[Tensor, Tensor]:
        own = slice(i, i + 1)
        return step_reference(
            x[own],
            m[i :: len(x)],
            table,
            rows[i],
            None if z is None else z[own],
            None if seeds is None else seeds[own],
            None if guidance is None else guidance[own],
            rescale,
            [one[own] for one in history],
        )

    results, x0s = zip(*(alone(i) for i in range(len(x))), strict=True)
    return torch.cat(results), torch.cat(x0s)


def _sum(*terms: tuple[float, Tensor | None]) -> Tensor:
    total: Tensor | None = None
    for coefficient, operand in terms:
        if coefficient != 0 and operand is not None:
            total = operand * coefficient if total is None else total + operand * coefficient
    if total is None:
        first = next(operand for _, operand in terms if operand is not None)
        return torch.zeros_like(first)
    return total


def _checked_noise(noise: Tensor | None, x: Tensor) -> Tensor:
    check_like("noise", noise, x, dtype=x.dtype)
    assert noise is not None
    return noise


def _check_variance(m: Tensor, x: Tensor) -> None:
    if x.ndim < 2 or m.shape[1] != 2 * x.shape[1]:
        raise ValueError(
            f"the table reads a learned variance: model_output must have {2 * x.shape[1] if x.ndim > 1 else 'twice'} "
            f"channels in axis 1, got shape {tuple(m.shape)}"
        )
