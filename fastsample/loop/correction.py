"""A caller's correction of x0, which stands between the model's estimate and its limit (improved-diffusion)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastsample.loop.options import CorrectX0
from fastsample.ops.step.reductions import limited
from fastsample.tables import Table


def corrected(correct: CorrectX0, x0: Tensor, t: Tensor, table: Table, row: int) -> Tensor:
    """What the caller makes of x0, limited as the row says."""
    result = correct(x0, t)
    if not isinstance(result, Tensor) or result.shape != x0.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"correct_x0 must return a tensor of shape {tuple(x0.shape)}, got {got}")
    return limited(result.to(x0.dtype), float(table.limit[row]), float(table.quantile[row]))


def without_x0(table: Table) -> Table:
    """The table with b = 0 and no limit: its step leaves b x0 to the loop, which adds it once x0 is corrected."""
    return table.derived("without_x0", lambda own: own.replace(b=0.0, limit=np.inf, quantile=0.0))
