"""What a sampling loop costs beyond the model: a run with a model that does nothing, less the bare model calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Timing, measure
from benchmarks.options import Run
from benchmarks.peers import diffusers_scheduler
from benchmarks.report import Row, against, rows_of, table
from fastsample import DDIM, Schedule

SHAPE = (1, 16, 7)  # one action chunk of a robot: nothing but overhead
STEPS, QUICK_STEPS = (1000, 10), (50, 10)  # 10 is what real-time users run; there the set-up of a run shows


def section(run: Run) -> list[Row]:
    """Microseconds a step, the model's own calls taken off round by round."""
    rows: list[Row] = []
    for steps in QUICK_STEPS if run.quick else STEPS:
        timings = measure(_candidates(steps), run.rounds)
        bare = timings.pop("bare model").seconds
        net = {name: Timing((one.seconds - bare) / steps, one.calls) for name, one in timings.items()}
        rows += rows_of("loop", f"1x16x7, {steps} steps", net, against("fastsample", net))
    print(table(rows), flush=True)
    return rows


def _candidates(steps: int) -> list[Candidate]:
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return m

    sampler = DDIM(Schedule.linear(1000), steps=steps)
    t = torch.zeros(1, dtype=torch.int64)

    def bare() -> None:
        for _ in range(steps):
            model(x, t)

    peer = _diffusers_loop(steps, model, x)
    return [
        *([Candidate("diffusers", peer)] if peer is not None else []),
        Candidate("fastsample", lambda: sampler(model, x)),
        Candidate("with callback", lambda: sampler(model, x, callback=lambda step: None)),
        Candidate("bare model", bare),
    ]


def _diffusers_loop(
    steps: int, model: Callable[[Tensor, Tensor], Tensor], start: Tensor
) -> Callable[[], Tensor] | None:
    scheduler = diffusers_scheduler(steps)
    if scheduler is None:
        return None

    def loop() -> Tensor:
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        return x

    return loop
