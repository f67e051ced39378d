"""What a sampling loop costs beyond the model: a run with a model that does nothing, less the bare model calls."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import methods
from benchmarks.cases.methods import Method
from benchmarks.cases.steps import SCHEDULE
from benchmarks.common.harness import Candidate, Timing, measure
from benchmarks.common.options import Run
from benchmarks.common.report import OURS, Row, against, rows_of, table
from benchmarks.peers.diffusers import diffusers_loop
from benchmarks.peers.plain_torch import plain_loop

SHAPE = (1, 16, 7)  # one action chunk of a robot: nothing but overhead
FEW = 10  # what real-time users run; there the set-up of a run shows
# And so many that it does not; a consistency model has no more than its teacher's 50.
LOOPS = (
    ("ddim", methods.DDIM_FREE, 1000),
    ("ddpm", methods.DDPM_SMALL, 1000),
    ("dpm_solver 2M", methods.DPM_SOLVER, 500),
    ("lcm", methods.LCM_FREE, 50),
)
QUICK_STEPS = 20
PLAIN = "plain torch loop"


def section(run: Run) -> list[Row]:
    """Microseconds a step, the model's own calls taken off round by round."""
    rows: list[Row] = []
    for name, method, many in LOOPS:
        for steps in (min(many, QUICK_STEPS) if run.quick else many, FEW):
            timings = measure(_candidates(method, steps, run.device), run.rounds, clock=run.loop_clock)
            bare = timings.pop("bare model").seconds
            net = {name: Timing((timing.seconds - bare) / steps, timing.calls) for name, timing in timings.items()}
            new_rows = rows_of(f"loop {name}", f"1x16x7, {steps} steps", net, against(OURS, net))
            print(table(new_rows), flush=True)
            rows += new_rows
    return rows


def _candidates(method: Method, steps: int, device: torch.device) -> list[Candidate]:
    x, m = (torch.randn(SHAPE, device=device) for _ in range(2))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return m

    sampler = method.sampler(SCHEDULE, steps=steps)
    t = torch.zeros(1, dtype=torch.int64, device=device)

    def bare() -> None:
        for _ in range(steps):
            model(x, t)

    peer = diffusers_loop(method, SCHEDULE, steps, model, x)
    return [
        *([Candidate("diffusers", peer)] if peer is not None else []),
        Candidate(PLAIN, plain_loop(sampler.table, model, x)),
        Candidate(OURS, lambda: sampler(model, x)),
        Candidate("with callback", lambda: sampler(model, x, callback=lambda step: None)),
        Candidate("bare model", bare),
    ]
