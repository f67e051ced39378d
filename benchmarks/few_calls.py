"""What a few model calls of a good solver are worth: whole runs of the digits model beside diffusers' DDIM at 50.

The ten digits, from the same noise, with and without guidance; all ways in turns. How good their samples are is what
`python -m benchmarks.quality` has measured. --write puts the table into README.md.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsample
from benchmarks.cases import methods
from benchmarks.common.harness import Candidate, Spread, measure, ratio, spread
from benchmarks.common.markers import replace_between
from benchmarks.common.options import Run, begin, parser, refuse
from benchmarks.common.report import Row, against, rows_of, table, write_csv
from benchmarks.common.sentences import closing
from benchmarks.peers.diffusers import diffusers_loop
from benchmarks.sections import quality_page
from benchmarks.sections.quality_cases import AS_DIFFUSERS, GUIDANCE, SAMPLES, Case
from fastsample.storage.writing import replace_text

README = Path(__file__).parents[1] / "README.md"
QUALITY = Path(__file__).with_name("results") / "quality-digits.csv"
BEGIN, END = "<!-- few calls, written by benchmarks.few_calls -->", "<!-- end of few calls -->"
STEPS, QUICK_STEPS = 50, 8
WAYS = (("DDIM", STEPS), ("DDIM", 10), ("DPM-Solver++ 2M", 10), ("UniPC-2", 10), ("UniPC-2", 5))
QUICK_WAYS = (("DDIM", QUICK_STEPS), ("UniPC-2", 2))


@dataclass(frozen=True)
class Found:
    """One way to draw the digits.

    Attributes:
        name: of it.
        guidance: the weight.
        milliseconds: a run, the median.
        faster: how many times as fast as diffusers' DDIM, p20, p50 and p80; None for itself.
        frechet: of its samples, as text.
    """

    name: str
    guidance: float
    milliseconds: float
    faster: Spread | None
    frechet: str


def main(argv: Sequence[str] | None = None) -> int:
    """Times all ways and writes the results."""
    flags = parser("benchmarks.few_calls", __doc__)
    flags.add_argument("--write", action="store_true", help="the table of README.md too")
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    if arguments.write and run.quick:
        refuse("--write is for whole runs")
    model, rows = fastsample.zoo.digits(), list[Row]()
    known = _frechet_distances()
    found: list[Found] = []
    with torch.no_grad():
        for guidance in (1.0, GUIDANCE):
            timed, of_guidance = _timed(model, guidance, run, known)
            rows += timed
            found += of_guidance
            print(table(timed))
    print(f"{closing(rows)}\n\n{page(found)}")
    write_csv(run.path("few-calls", ".csv"), rows)
    if arguments.write:
        replace_text(README, replace_between(README.read_text(), BEGIN, END, page(found)))
    return 0


def _timed(
    model: fastsample.zoo.UNet, guidance: float, run: Run, known: dict[tuple[str, int, float], str]
) -> tuple[list[Row], list[Found]]:
    x = fastsample.ops.randn((10, 1, 28, 28), seed=0)
    ways, steps = (QUICK_WAYS, QUICK_STEPS) if run.quick else (WAYS, STEPS)
    names = {f"{sampler}, {calls} calls": (sampler, calls) for sampler, calls in ways}
    peer = f"diffusers' DDIM, {steps} calls"
    runs = {name: _ours(model, Case(*way, 10, guidance), x) for name, way in names.items()}
    theirs = diffusers_loop(methods.DDIM_CLIP, model.schedule, steps, _whole(model, guidance), x)
    if theirs is None:
        refuse("diffusers is not installed: pip install diffusers")
    timings = measure([Candidate(peer, theirs), *(Candidate(name, call) for name, call in runs.items())], run.rounds)
    rows = rows_of(f"digits, guidance {guidance:g}", "batch 10", timings, against(peer, timings))
    distance = known.get((AS_DIFFUSERS, steps, guidance), "")
    found = [Found(peer, guidance, 1e3 * spread(timings[peer].seconds).p50, None, distance)]
    for name, (sampler, calls) in names.items():
        faster = ratio(timings[peer], timings[name])
        distance = known.get((sampler, calls, guidance), "")
        found.append(Found(name, guidance, 1e3 * spread(timings[name].seconds).p50, faster, distance))
    return rows, found


def _ours(model: fastsample.zoo.UNet, case: Case, x: Tensor) -> Callable[[], Tensor]:
    labels = torch.arange(10)
    options: dict[str, Any] = {
        "guidance": case.guidance,
        "cond": {"y": labels},
        "uncond": {"y": torch.full_like(labels, 10)},
    }
    if case.guidance == 1:
        options = {"model_kwargs": {"y": labels}}
    return partial(case.make(model), model, x, **options)


def _whole(model: fastsample.zoo.UNet, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as diffusers' loop calls it: t without an axis, and both halves combined by the caller."""
    labels = torch.arange(10)
    both = torch.cat([torch.full_like(labels, 10), labels])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = model(torch.cat([x, x]), t.expand(20), both)[:, :1]
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return guided if guidance != 1 else lambda x, t: model(x, t.expand(10), labels)[:, :1]


def _frechet_distances() -> dict[tuple[str, int, float], str]:
    """By sampler, calls and guidance, of the bundled model's samples."""
    with QUALITY.open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["count"]) == SAMPLES]
    return {
        (row["sampler"], int(row["calls"]), float(row["guidance"])): quality_page.interval(row, "frechet")
        for row in rows
    }


def page(found: Sequence[Found]) -> str:
    """The table, and what it comes to."""
    lines = [
        (
            one.name,
            "none" if one.guidance == 1 else f"{one.guidance:g}",
            f"{one.milliseconds:.0f} ms",
            "" if one.faster is None else f"{one.faster.p50:.1f}x [{one.faster.p20:.1f}, {one.faster.p80:.1f}]",
            one.frechet,
        )
        for one in found
    ]
    return quality_page.table(("", "guidance", "ten digits", "times as fast", "Frechet distance"), lines)


if __name__ == "__main__":
    raise SystemExit(main())
