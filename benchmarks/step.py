"""The step of every sampler, against its peers and against the memory it moves.

Sections, each with a result file of its own:
  noise-free  float32: diffusers, torch.compile, fastsample; copy and an in-place triad of as many streams as bounds
  noisy       the same with noise drawn in the pass; the bound is ops.randn(out=) plus the step without noise
  dtypes      model output and next input in half precision beside a float32 state
  matmul      the step after a matrix product: does it wait for threads or caches?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.repeatable import repeatable
from benchmarks.cases.steps import NOISE_FREE, NOISY, Case
from benchmarks.common import progress
from benchmarks.common.harness import Candidate, Timing, measure, ratio
from benchmarks.common.memory import copy, triad
from benchmarks.common.options import CPU, Run, begin, label, parser, refuse
from benchmarks.common.report import OURS, Row, against, percent, plot, rows_of, table, write_csv
from benchmarks.common.sentences import closing
from benchmarks.peers.diffusers import diffusers_step
from benchmarks.peers.plain_torch import compiled
from benchmarks.sections import contention, dtypes
from fastsample import ops

BOUND = "randn + noise-free"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and writes their results."""
    flags = parser("benchmarks.step", __doc__, gpus=True)
    sections: dict[str, Callable[[Run], list[Row]]] = {
        "noise-free": partial(section, cases=NOISE_FREE),
        "noisy": partial(section, cases=NOISY),
        "dtypes": dtypes.section,
        "matmul": contention.section,
    }
    flags.add_argument("--only", choices=sections, help="one section instead of all")
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    if any(len(shape) < 2 for shape in run.shapes):
        refuse("--shapes: a state has samples on its first axis and channels on its second")
    with torch.no_grad():
        for name, measured in sections.items():
            if arguments.only in (None, name):
                if name == "matmul" and run.device.type != "cpu":
                    print("matmul is left out: it is about the threads and caches of a CPU")
                    continue
                with progress.section(f"step-{name}", run.rounds, run.quick):
                    rows = measured(run)
                write_csv(run.path(f"step-{name}", ".csv"), rows, run.device)
                plot(run.path(f"step-{name}", ".png"), rows, f"benchmarks.step, {name}", run.device)
                print(f"\n{closing(rows)}", flush=True)
    return 0


def section(run: Run, cases: Sequence[Case]) -> list[Row]:
    """Times these cases in every shape."""
    rows: list[Row] = []
    for case in cases:
        check_agreement(case, run.device)
        for shape in run.shapes:
            x = torch.randn(shape, device=run.device)
            timings = measure(candidates(case, x, with_compile=not run.quick), run.rounds, clock=run.clock)
            bound = next(name for name in ("triad", "copy", BOUND) if name in timings or name == BOUND)
            if bound == BOUND:
                timings[BOUND] = Timing(timings["randn"].seconds + timings["noise-free"].seconds, 1)
            new_rows = rows_of(f"step {case.name}", label(shape), timings, {**against(OURS, timings), OURS: bound})
            print(table(new_rows), flush=True)
            if bound != BOUND:
                of_copy = percent(ratio(timings["copy"], timings[OURS]), case.streams / 2)
                print(f"  {OURS}: {of_copy} of the copy's speed by counted bytes")
            if bound == "triad":
                print(f"  {OURS}: {percent(ratio(timings[bound], timings[OURS]))} of the triad's (as many streams)")
            rows += new_rows
    return rows


def candidates(case: Case, x: Tensor, *, with_compile: bool) -> list[Candidate]:
    """All that do the same step, on the same x, m and history: nobody has luck with pages or finds colder caches."""
    operands, steady = case.operands(x.shape, x.device), repeatable(case.table)
    m, row, n, traffic = operands.m, case.row, x.numel(), 4 * case.streams * x.numel()
    peers = {
        "diffusers": diffusers_step(case, x, operands),
        "torch.compile": compiled(case.plain, case.plain_arguments(x, operands)) if with_compile else None,
    }
    timed = [Candidate(name, call, bytes=traffic) for name, call in peers.items() if call is not None]
    timed.append(Candidate(OURS, partial(case.plan(x, operands.history, steady, x), m, row), bytes=traffic))
    if any(case.table.stochastic):
        quiet, z = case.plan(x, operands.history, steady.replace(s=0.0), x), torch.empty_like(x)
        return [
            *timed,
            Candidate("noise-free", partial(quiet, m, row)),
            Candidate("randn", partial(ops.randn, z.shape, seed=0, out=z), bytes=4 * n),
        ]
    if x.is_cpu:
        # The entry that is written over the oldest one is a stream of its own, though not another array.
        spare = [torch.randn_like(entry) for entry in operands.history[-1:]]
        streams = [*m.split(len(x)), *operands.history, *spare]
        timed.append(Candidate("triad", triad(x, streams), bytes=traffic))
    return [*timed, Candidate("copy", copy(x, m), bytes=8 * n)]


def check_agreement(case: Case, device: torch.device = CPU) -> None:
    """Fails unless fastsample, diffusers and plain torch compute the same step from the same noise."""
    x = torch.randn(2, 4, 8, 8, device=device)
    operands = case.operands(x.shape, device)
    peers = [diffusers_step(case, x, operands), partial(case.plain, *case.plain_arguments(x, operands))]
    with torch.random.fork_rng(devices=[] if x.is_cpu else [device]):
        results = [_first(_from_seed_0(step)) for step in peers if step is not None]
        noise = _from_seed_0(partial(torch.randn, x.shape, device=device))
    ours = case.plan(x, operands.history, case.table, None)(operands.m, case.row, noise)
    for theirs in results:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _from_seed_0(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return call()


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


if __name__ == "__main__":
    raise SystemExit(main())
