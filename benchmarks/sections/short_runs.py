"""Short runs, a model that does nothing: all that a whole run costs, set-up included, against a plain torch loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

import fastsample
from benchmarks.cases import methods
from benchmarks.cases.steps import SCHEDULE
from benchmarks.common.harness import Candidate, Timing, measure
from benchmarks.common.options import Run, label
from benchmarks.common.report import Row, against, rows_of, table
from benchmarks.peers.diffusers import diffusers_loop
from benchmarks.peers.plain_torch import plain_loop
from benchmarks.sections.overhead import PLAIN
from fastsample import DDIM

SHAPES = ((1, 16, 7), (1, 4, 64, 64))
STEPS = (10, 50)
RUNS = 1000  # of which the slowest hundredth is looked at
QUICK_RUNS = 20
IN_A_ROW = 20


def section(run: Run) -> list[Row]:
    """Microseconds a run on one thread; each kind by the plain loop, round by round. Then p99 over median of runs."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape in SHAPES:
            for steps in STEPS:
                calls = _calls(shape, steps, run.device)
                candidates = [Candidate(name, call) for name, call in calls.items()]
                timings = measure(candidates, run.rounds, clock=run.loop_clock)
                case = f"{label(shape)}, {steps} steps"
                rows += rows_of("short run", case, timings, against(PLAIN, timings))
                rows += _tails(case, calls, QUICK_RUNS if run.quick else RUNS)
    finally:
        torch.set_num_threads(threads)
    print(table(rows), flush=True)
    return rows


def _calls(shape: tuple[int, ...], steps: int, device: torch.device) -> dict[str, Callable[[], object]]:
    x, m = (torch.randn(shape, device=device) for _ in range(2))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return m

    sampler = DDIM(SCHEDULE, steps=steps, timesteps="leading")
    peer = diffusers_loop(methods.DDIM_FREE, SCHEDULE, steps, model, x)
    return {
        PLAIN: plain_loop(sampler.table, model, x),
        "plain torch loop, torch.add": plain_loop(sampler.table, model, x, added=True),
        "DDIM object": partial(sampler, model, x),
        "DDIM.prepare": partial(sampler.prepare(model, x), x),
        "fastsample.ddim()": partial(fastsample.ddim, model, x, schedule=SCHEDULE, steps=steps, timesteps="leading"),
        **({} if peer is None else {"diffusers": peer}),
    }


def _tails(case: str, calls: dict[str, Callable[[], object]], runs: int) -> list[Row]:
    """Each run timed alone, a few of a kind in a row: quantiles are of single runs, the ratio is p99 by median."""
    seconds = {name: np.empty(runs) for name in calls}
    for first in range(0, runs, IN_A_ROW):
        for name, call in calls.items():
            call()  # the caches are another kind's
            for k in range(first, min(first + IN_A_ROW, runs)):
                start = perf_counter()
                call()
                seconds[name][k] = perf_counter() - start
    rows = []
    for name, times in seconds.items():
        [row] = rows_of("short run, p99 by median", case, {name: Timing(times, 1)}, {})
        late = float(np.quantile(times, 0.99) / np.median(times))
        rows.append(replace(row, baseline="its median", ratio_p20=late, ratio_p50=late, ratio_p80=late, claim="p99"))
    return rows
