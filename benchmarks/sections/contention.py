"""The step between matrix products, as a model makes them: only the step is timed.

Whatever follows a product finds its data pushed out of the caches. torch's own addition of the same two tensors pays
for that too; what the step pays beyond it is waiting for threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cases.repeatable import repeatable
from benchmarks.cases.steps import DDIM_STEP
from benchmarks.common.harness import Candidate, measure, spread
from benchmarks.common.options import Run, label
from benchmarks.common.report import Row, rows_of, table
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan

SHAPES = ((8, 4, 64, 64), (8, 3, 256, 256), (16, 3, 512, 512))
WIDTHS, QUICK_WIDTHS = (256, 1024), (64,)
KINDS = ("fastsample", "torch.add")


def section(run: Run) -> list[Row]:
    """Times step and addition on their own and after a product."""
    rows: list[Row] = []
    for shape in SHAPES[:1] if run.quick else SHAPES:
        for width in QUICK_WIDTHS if run.quick else WIDTHS:
            timings = measure(_candidates(shape, width), run.rounds)
            baselines = {f"{kind} after mm": f"{kind} alone" for kind in KINDS}
            new_rows = rows_of("matmul", f"{label(shape)}, mm {width}", timings, baselines)
            ours, control = (timings[f"{kind} after mm"].seconds / timings[f"{kind} alone"].seconds for kind in KINDS)
            low, middle, high = spread(ours / control)
            print(table(new_rows))
            print(
                f"  the step slows down {middle:.2f} ({low:.2f} .. {high:.2f}) times as much as torch.add", flush=True
            )
            rows += new_rows
    return rows


def _candidates(shape: tuple[int, ...], width: int) -> list[Candidate]:
    x, m = torch.randn(shape), torch.randn(shape)
    left, right, product = (torch.randn(width, width) for _ in range(3))
    plan = StepPlan(Operands(x, repeatable(DDIM_STEP.table), out=x))
    calls = {
        "fastsample": partial(plan, m, 0),
        # m + x/2: bounded however often it is applied.
        "torch.add": partial(torch.add, m, x, alpha=0.5, out=x),
    }
    conditions: dict[str, Callable[[], object]] = {
        "alone": _nothing,
        "after mm": partial(torch.mm, left, right, out=product),
    }
    return [
        Candidate(f"{kind} {condition}", calls[kind], before, bytes=12 * x.numel())
        for kind in KINDS
        for condition, before in conditions.items()
    ]


def _nothing() -> None:
    """Makes the clock start and stop around each call, as it does after a product."""
