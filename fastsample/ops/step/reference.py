"""The sampling step in plain torch: the specification of every backend's kernel, and what gradients go through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops.checks import check_output, check_variance, checked_noise
from fastsample.ops.noise import STEP, normals
from fastsample.ops.step.reductions import limited, rescale_factor
from fastsample.tables import HISTORY, Table, without_rounding


def step_reference(
    x: Tensor,
    m: Tensor,
    table: Table,
    row: int | Tensor,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    guidance: Tensor | None = None,
    rescale: float = 0.0,
    history: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """(x', h) of one row in plain torch: the specification. Differentiable; computes in x's dtype."""
    check_output(m, x, guided=guidance is not None)
    if isinstance(row, Tensor) and row.ndim > 0:
        return _rows_reference(x, m, table, row.tolist(), z, keys, guidance, rescale, history)
    row = int(row)
    conditional = m[-len(x) :].to(x.dtype)
    if table.learned[row]:
        check_variance(m, x)
    v = conditional[:, x.shape[1] :] if x.ndim > 1 else conditional
    if conditional.shape != x.shape:
        conditional = conditional[:, : x.shape[1]]
    combined = conditional
    if len(m) > len(x):
        assert guidance is not None
        unconditional = m[: len(x)].to(x.dtype)
        unconditional = unconditional[:, : x.shape[1]] if unconditional.shape != x.shape else unconditional
        weight = per_sample(guidance.to(x.dtype), x)
        combined = _guided(unconditional, conditional, weight)
        if rescale != 0:
            combined = combined * rescale_factor(combined, conditional, rescale)
    if table.stochastic[row]:
        if z is None and keys is not None:
            z = normals(x.shape, keys, row, STEP, x.device).to(x.dtype)
        z = checked_noise(z, x)
        if table.learned[row]:
            z = z * torch.exp2((v * (float(table.g1[row]) / math.log(2))).clamp(-126, 127))
    p, q, a, b, d, hx, h0 = (float(getattr(table, name)[row]) for name in ("p", "q", "a", "b", "d", "hx", "h0"))
    s = float(table.s[row]) * math.exp(float(table.g0[row]))
    limit, quantile = float(table.limit[row]), float(table.quantile[row])
    earlier = [(float(getattr(table, name)[row]), h) for name, h in zip(HISTORY, history, strict=False)]
    if math.isinf(limit) and quantile == 0:
        # Folded before rounding: at high noise p is in the thousands and x0 would lose what x' still has.
        result = _sum((b * q + d, combined), (a + b * p, x), *earlier, (s, z))
        entry = _sum((float(without_rounding(hx, h0 * p)), x), (h0 * q, combined))
    else:
        x0 = limited(_sum((p, x), (q, combined)), limit, quantile)
        result = _sum((d, combined), (b, x0), (a, x), *earlier, (s, z))
        entry = _sum((h0, x0), (hx, x))
    return result, entry


def _guided(unconditional: Tensor, conditional: Tensor, weight: Tensor) -> Tensor:
    """m_u + w (m_c - m_u): exactly one half at w = 1 or 0, whatever the other holds, with the derivatives of all."""
    difference = conditional - unconditional
    alone = (weight == 0) | (weight == 1)
    difference = torch.where(alone & ~difference.isfinite(), 0.0, difference)
    return torch.where(weight == 0, unconditional + weight * difference, conditional + (weight - 1) * difference)


def _rows_reference(
    x: Tensor,
    m: Tensor,
    table: Table,
    rows: list[int],
    z: Tensor | None,
    keys: Tensor | None,
    guidance: Tensor | None,
    rescale: float,
    history: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    def alone(i: int) -> tuple[Tensor, Tensor]:
        own = slice(i, i + 1)
        if not -len(table) <= rows[i] < len(table):  # as kernels have it, which cannot raise
            nothing = torch.full_like(x[own], math.nan)
            return nothing, nothing
        return step_reference(
            x[own],
            m[i :: len(x)],
            table,
            rows[i],
            None if z is None else z[own],
            None if keys is None else keys[own],
            None if guidance is None else guidance[own],
            rescale,
            [one[own] for one in history],
        )

    results, x0s = zip(*(alone(i) for i in range(len(x))), strict=True)
    return torch.cat(results), torch.cat(x0s)


def next_scale(table: Table, row: int | Tensor, x: Tensor) -> float | Tensor:
    """e of the rows after these, to be multiplied with x: what the next model input is scaled by."""
    scales = [*table.e[1:].tolist(), 1.0]
    if not isinstance(row, Tensor):
        return scales[row]
    found = [scales[k] if -len(table) <= k < len(table) else math.nan for k in row.tolist()]
    return per_sample(torch.tensor(found, dtype=x.dtype, device=x.device), x)


def _sum(*terms: tuple[float, Tensor | None]) -> Tensor:
    total: Tensor | None = None
    for coefficient, operand in terms:
        if operand is not None and _counts(coefficient, operand.dtype):
            total = operand * coefficient if total is None else total + operand * coefficient
    if total is None:
        first = next(operand for _, operand in terms if operand is not None)
        return torch.zeros_like(first)
    return total


def _counts(coefficient: float, dtype: torch.dtype) -> bool:
    """Whether the operand is read: the coefficient is not 0 as kernels have it, in float32."""
    return coefficient != 0 and (dtype == torch.float64 or abs(coefficient) > 2.0**-150)
