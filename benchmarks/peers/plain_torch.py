"""The sampling loops that users have: around diffusers' schedulers, as its pipelines write it, and in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.pairs import Pair
from fastsample import Schedule, Table


def diffusers_loop(
    pair: Pair, schedule: Schedule, steps: int, model: Callable[[Tensor, Tensor], Tensor], start: Tensor
) -> Callable[[], Tensor] | None:
    """A whole run from `start`; `model` is given t as the scheduler has it, 0-d. None where diffusers is absent.

    set_timesteps belongs to the run, as it does in every pipeline: it also sets the multistep schedulers back.
    """
    scheduler = pair.theirs(schedule, steps)
    if scheduler is None:
        return None

    def loop() -> Tensor:
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, **pair.step_options).prev_sample
        return x

    return loop


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
