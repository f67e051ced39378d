"""Standard normals: fastsample.ops.randn against torch's generator; with --quality whether they are normal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.common import progress
from benchmarks.common.harness import Candidate, measure
from benchmarks.common.options import Run, Shape, begin, label, parser
from benchmarks.common.report import OURS, Row, against, plot, rows_of, table, write_csv
from benchmarks.common.sentences import closing
from benchmarks.sections import noise_quality
from fastsample import ops


def main(argv: Sequence[str] | None = None) -> int:
    """Times the noise, or studies it, and writes the results."""
    flags = parser("benchmarks.noise", __doc__, gpus=True)
    flags.add_argument("--quality", action="store_true", help="statistics of 12.6 million values instead of times")
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    if arguments.quality:
        findings = noise_quality.study(noise_quality.QUICK_SHAPE if run.quick else noise_quality.SHAPE)
        print(noise_quality.table(findings))
        write_csv(run.path("noise-quality", ".csv"), findings)
        return 0
    with progress.section("noise", run.rounds, run.quick):
        rows = speed(run)
    write_csv(run.path("noise", ".csv"), rows, run.device)
    plot(run.path("noise", ".png"), rows, "benchmarks.noise", run.device)
    print(f"\n{closing(rows)}")
    return 0


def speed(run: Run) -> list[Row]:
    """Times every shape, into a given buffer and as a fresh tensor."""
    rows: list[Row] = []
    for shape in run.shapes:
        buffer = torch.empty(shape, device=run.device)
        for case, candidates in (("in a buffer", into(buffer)), ("fresh", fresh(shape, run.device))):
            timings = measure(candidates, run.rounds, clock=run.clock)
            new_rows = rows_of("noise", f"{label(shape)} {case}", timings, against(OURS, timings))
            print(table(new_rows), flush=True)
            rows += new_rows
    return rows


def into(buffer: torch.Tensor) -> list[Candidate]:
    """Everybody fills the same buffer; fill_ is what its memory alone takes."""
    traffic = 4 * buffer.numel()
    return [
        Candidate("torch normal_", buffer.normal_, bytes=traffic),
        Candidate(OURS, partial(ops.randn, buffer.shape, seed=0, out=buffer), bytes=traffic),
        Candidate("fill_", partial(buffer.fill_, 1.0), bytes=traffic),
    ]


def fresh(shape: Shape, device: torch.device) -> list[Candidate]:
    """A new tensor every time, page faults included: how both are mostly called."""
    traffic = 4 * torch.Size(shape).numel()
    return [
        Candidate("torch.randn", partial(torch.randn, shape, device=device), bytes=traffic),
        Candidate(OURS, partial(ops.randn, shape, seed=0, device=device), bytes=traffic),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
