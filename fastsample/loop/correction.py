"""A caller's correction of x0, which stands between the model's estimate and its limit (improved-diffusion)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastsample.checks import check_has_values
from fastsample.loop.options import CorrectX0
from fastsample.ops.step.reductions import limited
from fastsample.tables import Table


def corrected(correct: CorrectX0, x0: Tensor, t: Tensor, table: Table, row: int) -> Tensor:
    """What the caller makes of x0, limited as the row says."""
    result = correct(x0, t)
    if not isinstance(result, Tensor) or result.shape != x0.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"correct_x0 must return a tensor of shape {tuple(x0.shape)}, got {got}")
    if result.is_meta and not x0.is_meta:
        check_has_values("what correct_x0 returned", result)
    return limited(result.to(x0.dtype), table, row)


def of_x0_alone(table: Table) -> Table:
    """The table whose step makes x0 of the state, for callers to see where entries are not x0."""
    nothing = dict.fromkeys(("a", "c1", "c2", "c3", "d", "s", "g0", "g1", "hx"), 0.0)
    return table.derived("of_x0_alone", lambda own: own.replace(**nothing, b=1.0, h0=1.0))


def without_x0(table: Table) -> Table:
    """The table with b = 0 and no limit: its step leaves b x0 to the loop, which adds it once x0 is corrected.

    Entries that are not x0 itself lack h0 x0 in the same way.
    """

    def make(own: Table) -> Table:
        left_out = {"b": 0.0} if own.remembers_x0 else {"b": 0.0, "h0": 0.0}
        return own.replace(**left_out, limit=np.inf, quantile=0.0)

    return table.derived("without_x0", make)
