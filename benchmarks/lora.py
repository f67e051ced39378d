"""LoRA on attention projections: what it costs beside the same linears without one, and whole UNets.

Sections, each with a result file for each dtype:
  projections  q, k and v of one input: three nn.Linear, PEFT, addmm, torch.compile, OpenVINO where it is, fastsample
  adapters     two adapters at once, and four over the samples of a batch
  unet         a UNet of the size of Stable Diffusion 1.5 with random weights, with and without LoRA

--shapes (with --only) takes ROWSxWIDTH or ROWSxINxOUT for the first two, latents such as 1x4x64x64 for the last.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.common import precision, progress
from benchmarks.common.options import Run, Shape, begin, parser, refuse
from benchmarks.common.report import Row, plot, write_csv
from benchmarks.common.sentences import closing
from benchmarks.machine_code.fma import PEAK
from benchmarks.sections import adapters, projections, unets
from benchmarks.sections.projections import dtypes_named, name_of


class Section(NamedTuple):
    """What is measured, in which shapes, with how many axes, and in which dtypes."""

    measured: Callable[[Run, torch.dtype], list[Row]]
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]
    axes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


_OF_LINEARS = (projections.SHAPES, projections.QUICK_SHAPES, (2, 3), projections.DTYPES)
SECTIONS: Mapping[str, Section] = {
    "projections": Section(projections.section, *_OF_LINEARS),
    "adapters": Section(adapters.section, *_OF_LINEARS),
    "unet": Section(unets.section, unets.SHAPES, unets.QUICK_SHAPES, (4,), unets.DTYPES),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and writes their results."""
    flags = parser("benchmarks.lora", __doc__, gpus=True)
    flags.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    flags.add_argument(
        "--dtypes", type=_dtypes, help=f"comma separated, of {', '.join(map(name_of, projections.DTYPES))}"
    )
    flags.add_argument(
        "--fp32-precision", choices=precision.CHOICES, help=f"{precision.SWITCH}; float32 alone, in files of its own"
    )
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    sections = {name: section for name, section in SECTIONS.items() if arguments.only in (None, name)}
    _check(arguments, run, sections)
    variant = f"-precision-{arguments.fp32_precision}" if arguments.fp32_precision else ""
    with torch.no_grad(), precision.switched(arguments.fp32_precision):
        for name, section in sections.items():
            shapes = arguments.shapes or (section.quick_shapes if run.quick else section.shapes)
            for dtype in (torch.float32,) if variant else arguments.dtypes or section.dtypes:
                file = f"lora-{name}-{name_of(dtype)}{variant}"
                with progress.section(file, run.rounds, run.quick):
                    rows = section.measured(replace(run, shapes=shapes), dtype)
                if rows:
                    write_csv(run.path(file, ".csv"), rows, run.device)
                    timed = [row for row in rows if row.provider != PEAK]
                    title = f"benchmarks.lora, {name}, {name_of(dtype)}{variant.replace('-', ' ')}"
                    plot(run.path(file, ".png"), timed, title, run.device)
                    print(f"\n{closing(timed)}", flush=True)
    return 0


def _check(arguments: Namespace, run: Run, sections: Mapping[str, Section]) -> None:
    """Exits with status 2 where flags do not fit each other, before anything is measured."""
    if arguments.shapes and not arguments.only:
        refuse("--shapes: say with --only which section they are for")
    for name, section in sections.items():
        if any(len(shape) not in section.axes for shape in arguments.shapes or ()):
            refuse(f"--shapes: {name} takes shapes of {' or '.join(map(str, section.axes))} sizes")
        if any(dtype not in section.dtypes for dtype in arguments.dtypes or ()):
            refuse(f"--dtypes: {name} takes {', '.join(map(name_of, section.dtypes))}; choose a section with --only")
    if arguments.fp32_precision:
        if run.device.type != "cpu" or arguments.dtypes not in (None, (torch.float32,)):
            refuse("--fp32-precision: this switch is for float32 on CPUs")
        if reason := precision.refusal(arguments.fp32_precision):
            refuse(f"--fp32-precision: {reason}")


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    return dtypes_named(text, projections.DTYPES)


if __name__ == "__main__":
    raise SystemExit(main())
