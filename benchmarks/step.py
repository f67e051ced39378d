"""The DDIM step, float32, against its peers and against the memory it moves.

Sections, each with a result file of its own:
  step    one step: diffusers, torch.compile, plain torch, fastsample; copy and triad of the same data as lower bounds
  loop    what a whole run costs beyond the model, per step
  matmul  the step after a matrix product: does it wait for threads or caches?
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import fastsample
from benchmarks import contention, overhead
from benchmarks.harness import Candidate, measure, ratio
from benchmarks.options import Run, begin, label, parser
from benchmarks.peers import ROW, STEPS, compiled_step, diffusers_scheduler, diffusers_step
from benchmarks.report import Row, against, plot, rows_of, table, write_csv
from benchmarks.settling import settling_table
from fastsample import DDIM, Schedule, Table
from fastsample.ops.backend import _cpu
from fastsample.ops.noise import sample_seeds
from fastsample.ops.step import StepPlan

OURS = "fastsample"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and writes their results."""
    flags = parser("benchmarks.step", __doc__)
    sections = {"step": step_section, "loop": overhead.section, "matmul": contention.section}
    flags.add_argument("--only", choices=sections, help="one section instead of all")
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    with torch.no_grad():
        for name, section in sections.items():
            if arguments.only in (None, name):
                rows = section(run)
                stem = "step" if name == "step" else f"step-{name}"
                write_csv(run.path(stem, ".csv"), rows)
                plot(run.path(stem, ".png"), rows, f"benchmarks.step, {name}")
    return 0


def step_section(run: Run) -> list[Row]:
    """Times the step in every shape, deterministic and then with clamp and noise."""
    check_agreement()
    rows: list[Row] = []
    for shape in run.shapes:
        # All candidates work on the same two tensors: nobody has luck with pages or finds colder caches.
        x, m = torch.randn(shape), torch.randn(shape)
        for case, candidates in (
            ("eta 0", deterministic(x, m, with_compile=not run.quick)),
            ("eta 1, clip", stochastic(x, m)),
        ):
            timings = measure(candidates, run.rounds)
            found = rows_of("step", f"{label(shape)} {case}", timings, against(OURS, timings))
            print(table(found), flush=True)
            if "triad" in timings:
                of_triad, of_copy = (ratio(timings[bound], timings[OURS]) for bound in ("triad", "copy"))
                speed = next(row.gb_per_s for row in found if row.provider == OURS)
                print(
                    f"  {OURS}: {speed:.1f} GB/s; {_percent(of_triad)} of the triad's speed (same bytes), "
                    f"{_percent(of_copy)} of the copy's by time, {_percent(of_copy, 1.5)} by counted bytes"
                )
            rows += found
    return rows


def deterministic(x: Tensor, m: Tensor, *, with_compile: bool) -> list[Candidate]:
    """The step without noise and clamp, and the lower bounds: 3 streams of memory."""
    row, n = settling_table(), x.numel()
    plan = StepPlan(x, row, seeds=None, out=x, x0_out=None, input_out=None, backend="cpu")
    threads = torch.get_num_threads()
    peers = {"diffusers": diffusers_step(x, m), "torch.compile": compiled_step(x, m) if with_compile else None}
    # Half of each, as the row above: bounded however often it is applied. The copy leaves x = m.
    triad = partial(_cpu.triad, x.data_ptr(), m.data_ptr(), 0.5, 0.5, n, threads)
    return [
        *(Candidate(name, call, bytes=12 * n) for name, call in peers.items() if call is not None),
        Candidate("reference", partial(fastsample.ops.step, x, m, row, 0, backend="reference"), bytes=12 * n),
        Candidate("ops.step", partial(fastsample.ops.step, x, m, row, 0, out=x), bytes=12 * n),
        Candidate(OURS, partial(plan, m, 0), bytes=12 * n),
        Candidate("triad", triad, bytes=12 * n),
        Candidate("copy", partial(_cpu.copy, x.data_ptr(), m.data_ptr(), n, threads), bytes=8 * n),
    ]


def stochastic(x: Tensor, m: Tensor) -> list[Candidate]:
    """The step with clamp and fresh noise. x stays bounded by itself: x' is made of a clamped x0, m and noise."""
    row = _ancestral_table()
    plan = StepPlan(x, row, seeds=sample_seeds(0, len(x)), out=x, x0_out=None, input_out=None, backend="cpu")
    peer = diffusers_step(x, m, eta=1.0, clip=True)
    return [
        *([Candidate("diffusers", peer, bytes=12 * x.numel())] if peer is not None else []),
        Candidate(OURS, partial(plan, m, ROW), bytes=12 * x.numel()),
    ]


def check_agreement() -> None:
    """Fails unless fastsample and diffusers compute the same step, in both cases."""
    x, m, z = (torch.randn(2, 4, 8, 8) for _ in range(3))
    for eta, clip, ours in (
        (0.0, False, DDIM(Schedule.linear(1000), steps=STEPS).table),
        (1.0, True, _ancestral_table()),
    ):
        scheduler = diffusers_scheduler(clip=clip)
        if scheduler is None:
            return
        noise = z if eta else None
        theirs = scheduler.step(m, scheduler.timesteps[ROW], x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(fastsample.ops.step(x, m, ours, ROW, noise=noise), theirs, rtol=1e-4, atol=1e-4)


def _ancestral_table() -> Table:
    return DDIM(Schedule.linear(1000), steps=STEPS, eta=1.0, clip=1.0, rederive_epsilon=False).table


def _percent(fraction: tuple[float, float, float], factor: float = 1.0) -> str:
    low, middle, high = (100 * factor * value for value in fraction)
    return f"{middle:.0f} % ({low:.0f} .. {high:.0f})"


if __name__ == "__main__":
    raise SystemExit(main())
