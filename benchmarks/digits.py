"""The bundled digits model: what a forward pass costs, and what one DDIM step adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

import fastsample
from benchmarks.cases.repeatable import repeatable
from benchmarks.cases.steps import DDIM_STEP
from benchmarks.common.harness import Candidate, measure, spread
from benchmarks.common.options import begin, parser
from benchmarks.common.report import Row, plot, rows_of, table, write_csv
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan

BATCHES, QUICK_BATCHES = (1, 16, 64), (1,)


def main(argv: Sequence[str] | None = None) -> int:
    """Times both for every batch size and writes the results."""
    run = begin(parser("benchmarks.digits", __doc__, gpus=True).parse_args(argv))
    model, rows = fastsample.zoo.digits().to(run.device), list[Row]()
    with torch.no_grad():
        for batch in QUICK_BATCHES if run.quick else BATCHES:
            x, y = torch.randn(batch, 1, 28, 28, device=run.device), torch.arange(batch, device=run.device) % 10
            t = torch.full_like(y, 500)
            output, state = model(x, t, y), x.clone()
            plan = StepPlan(Operands(state, repeatable(DDIM_STEP.table), out=state))
            timings = measure(
                [
                    Candidate("forward", partial(model, x, t, y)),
                    Candidate("step", partial(plan, output, 0)),
                ],
                run.rounds,
                clock=run.loop_clock,
            )
            new_rows = rows_of("digits", f"batch {batch}", timings, {})
            low, middle, high = (1e3 * seconds / batch for seconds in spread(timings["forward"].seconds))
            print(table(new_rows))
            print(f"  forward: {middle:.2f} ({low:.2f} .. {high:.2f}) ms an image", flush=True)
            rows += new_rows
    write_csv(run.path("digits", ".csv"), rows, run.device)
    plot(run.path("digits", ".png"), rows, "benchmarks.digits", run.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
