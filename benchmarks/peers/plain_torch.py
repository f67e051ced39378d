"""What users write in plain torch: a sampling loop, and a step under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastsample import Table


def plain_loop(
    table: Table, model: Callable[[Tensor, Tensor], Tensor], start: Tensor, *, added: bool = False
) -> Callable[[], Tensor]:
    """A whole run from `start` as one writes it in plain torch, y = a y + b m, with everything else made beforehand.

    Rows that limit x0 are not for it. A row that adds noise adds s torch.randn_like(y); one that reads the x0 of the
    last row keeps it. `added` multiplies and adds b m at once, torch.add(a y, m, alpha=b), which rounds once less.
    """
    a, b = (table.a + table.b * table.p).tolist(), (table.b * table.q + table.d).tolist()
    rows = list(zip(a, b, table.c1.tolist(), (table.s * np.exp(table.g0)).tolist(), strict=True))
    p, q = table.p.tolist(), table.q.tolist()
    times = [torch.full(start.shape[:1], t, device=start.device) for t in table.times]

    def loop() -> Tensor:
        with torch.inference_mode():
            y = start
            if added:
                for (a, b, _, _), t in zip(rows, times, strict=True):
                    y = torch.add(a * y, model(y, t), alpha=b)
            else:
                for (a, b, _, _), t in zip(rows, times, strict=True):
                    y = a * y + b * model(y, t)
            return y

    def longer_loop() -> Tensor:
        with torch.inference_mode():
            y, h = start, None
            for k, ((a, b, c, s), t) in enumerate(zip(rows, times, strict=True)):
                m = model(y, t)
                x0 = p[k] * y + q[k] * m if table.history else None
                y = a * y + b * m
                if c:
                    y = y + c * h
                if s:
                    y = y + s * torch.randn_like(y)
                h = x0
            return y

    return longer_loop if table.history or any(table.stochastic) else loop


def compiled(step: Callable[..., object], arguments: list[Tensor]) -> Callable[[], object] | None:
    """A plain step under torch.compile, already compiled for these arguments."""
    torch.compiler.reset()
    made = torch.compile(step, fullgraph=True, dynamic=False)
    try:
        made(*arguments)
    except Exception as error:  # whatever its toolchain lacks, the other rows are worth having
        print(f"torch.compile is left out, it failed: {str(error).strip().splitlines()[0]}")
        return None
    return lambda: made(*arguments)
