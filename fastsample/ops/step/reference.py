"""The sampling step in plain torch: the specification of every backend's kernel, and what gradients go through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops.checks import check_output, check_variance, checked_noise
from fastsample.ops.noise import STEP, normals
from fastsample.ops.step.log_prob import LN_2, log_prob_reference
from fastsample.ops.step.reductions import limited, rescale_factor
from fastsample.tables import HISTORY, Table, without_rounding


class Stepped(NamedTuple):
    """What a step makes: x', the entry h, and where that was asked for the log density of what was drawn, (B,)."""

    state: Tensor
    entry: Tensor
    log_prob: Tensor | None = None


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
    *,
    with_log_prob: bool = False,
) -> Stepped:
    """One row in plain torch: the specification. Differentiable; computes in x's dtype, log densities in float64."""
    check_output(m, x, guided=guidance is not None)
    if isinstance(row, Tensor) and row.ndim > 0:
        return _rows_reference(x, m, table, row.tolist(), z, keys, guidance, rescale, history, with_log_prob)
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
    exponent: Tensor | float = 0.0  # of the noise's scale, in powers of 2
    scaled = None
    if table.stochastic[row]:
        if z is None and keys is not None:
            z = normals(x.shape, keys, row, STEP, x.device).to(x.dtype)
        scaled = z = checked_noise(z, x)
        if table.learned[row]:
            exponent = (v * (float(table.g1[row]) / LN_2)).clamp(-126, 127)
            scaled = z * torch.exp2(exponent)
    p, q, a, b, d, hx, h0 = (float(getattr(table, name)[row]) for name in ("p", "q", "a", "b", "d", "hx", "h0"))
    s = float(table.s[row]) * math.exp(float(table.g0[row]))
    limit, quantile = float(table.limit[row]), float(table.quantile[row])
    earlier = [(float(getattr(table, name)[row]), h) for name, h in zip(HISTORY, history, strict=False)]
    if math.isinf(limit) and quantile == 0:
        # Folded before rounding: at high noise p is in the thousands and x0 would lose what x' still has.
        mean = _sum((b * q + d, combined), (a + b * p, x), *earlier)
        entry = _sum((float(without_rounding(hx, h0 * p)), x), (h0 * q, combined))
    else:
        x0 = limited(_sum((p, x), (q, combined)), table, row)
        mean = _sum((d, combined), (b, x0), (a, x), *earlier)
        entry = _sum((h0, x0), (hx, x))
    state = _sum((1.0, mean), (s, scaled))
    if not with_log_prob:
        return Stepped(state, entry)
    if z is None:
        return Stepped(state, entry, torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device))
    return Stepped(state, entry, log_prob_reference(mean, z, math.log(s) + LN_2 * exponent))


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
    with_log_prob: bool,
) -> Stepped:
    def alone(i: int) -> Stepped:
        own = slice(i, i + 1)
        if not -len(table) <= rows[i] < len(table):  # as kernels have it, which cannot raise
            nothing = torch.full_like(x[own], math.nan)
            return Stepped(nothing, nothing, nothing.new_full((1,), math.nan) if with_log_prob else None)
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
            with_log_prob=with_log_prob,
        )

    states, entries, log_probs = zip(*(alone(i) for i in range(len(x))), strict=True)
    return Stepped(torch.cat(states), torch.cat(entries), torch.cat(log_probs) if with_log_prob else None)


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
