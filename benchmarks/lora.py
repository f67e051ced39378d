"""LoRA on attention projections: what it costs beside the same linears without one, and whole UNets.

Sections, each with a result file of its own:
  projections  q, k and v of one input in float32 and bfloat16: three nn.Linear, PEFT, addmm, torch.compile, fastsample
  adapters     two adapters at once, and four over the samples of a batch
  unet         a UNet of the size of Stable Diffusion 1.5 with random weights, with and without LoRA

--shapes (with --only) takes ROWSxWIDTH or ROWSxINxOUT for the first two, latents such as 1x4x64x64 for the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks import adapters, projections, unets
from benchmarks.options import Run, Shape, begin, parser, refuse
from benchmarks.report import Row, plot, write_csv

Section = Callable[[Run], list[Row]]
# Of each section also its shapes, the small ones of --quick, and how many axes a shape may have.
SECTIONS: dict[str, tuple[Section, tuple[Shape, ...], tuple[Shape, ...], tuple[int, ...]]] = {
    "projections": (projections.section, projections.SHAPES, projections.QUICK_SHAPES, (2, 3)),
    "adapters": (adapters.section, projections.SHAPES, projections.QUICK_SHAPES, (2, 3)),
    "unet": (unets.section, unets.SHAPES, unets.QUICK_SHAPES, (4,)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and writes their results."""
    flags = parser("benchmarks.lora", __doc__, gpus=True)
    flags.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    if arguments.shapes and not arguments.only:
        refuse("--shapes: say with --only which section they are for")
    with torch.no_grad():
        for name, (section, shapes, quick_shapes, axes) in SECTIONS.items():
            if arguments.only not in (None, name):
                continue
            if any(len(shape) not in axes for shape in arguments.shapes or ()):
                refuse(f"--shapes: {name} takes shapes of {' or '.join(map(str, axes))} sizes")
            own = arguments.shapes or (quick_shapes if run.quick else shapes)
            rows = section(replace(run, shapes=own))
            if rows:
                write_csv(run.path(f"lora-{name}", ".csv"), rows, run.device)
                timed = [row for row in rows if row.provider != projections.PEAK]
                plot(run.path(f"lora-{name}", ".png"), timed, f"benchmarks.lora, {name}", run.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
