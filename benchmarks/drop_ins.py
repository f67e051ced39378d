"""A run of a drop-in scheduler's steps, beside diffusers' scheduler of its name, where the model costs nothing.

Each class runs ten steps, set_timesteps before them included, from a state of every shape. The model's output is the
same tensor in every step, and noise is torch's in both.

--shapes takes states, such as 1x16x7.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import progress
from benchmarks.common.harness import Candidate, measure
from benchmarks.common.optional import optional
from benchmarks.common.options import Run, Shape, begin, label, parser
from benchmarks.common.report import OURS, Row, against, plot, rows_of, table, write_csv
from benchmarks.common.sentences import closing

STEPS = 10
SHAPES: tuple[Shape, ...] = ((1, 16, 7), (2, 4, 64, 64), (8, 3, 256, 256))
QUICK_SHAPES: tuple[Shape, ...] = SHAPES[:1]
# What a run is made with and its steps are given, by the name it is reported under.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}, {}),
    "DDIM, eta 1": ("DDIMScheduler", {}, {"eta": 1.0}),
    "DDPM": ("DDPMScheduler", {}, {}),
    "LCM": ("LCMScheduler", {}, {}),
    "Euler": ("EulerDiscreteScheduler", {}, {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "UniPC": ("UniPCMultistepScheduler", {}, {}),
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}, {}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all cases and writes their results."""
    run = begin(arguments := parser("benchmarks.drop_ins", __doc__, gpus=True).parse_args(argv))
    if optional("diffusers", "the peer") is None:
        return 0
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    shapes = arguments.shapes or (QUICK_SHAPES if run.quick else SHAPES)
    with progress.section("drop-ins", run.rounds, run.quick):
        rows = section(run, shapes)
    write_csv(run.path("drop-ins", ".csv"), rows, run.device)
    plot(run.path("drop-ins", ".png"), rows, "benchmarks.drop_ins", run.device)
    print(f"\n{closing(rows)}", flush=True)
    return 0


def section(run: Run, shapes: Sequence[Shape]) -> list[Row]:
    """Times runs of all cases from states of every shape."""
    rows: list[Row] = []
    for shape in shapes:
        for name in CASES:
            calls = {OURS: of_case(name, shape, run.device, True), "diffusers": of_case(name, shape, run.device, False)}
            candidates = [Candidate(provider, call) for provider, call in calls.items()]
            timings = measure(candidates, run.rounds, clock=run.loop_clock)
            found = rows_of(f"drop-in {name}", f"{label(shape)}, {STEPS} steps", timings, against("diffusers", timings))
            print(table(found), flush=True)
            rows += found
    return rows


def of_case(name: str, shape: Shape, device: torch.device, drop_in: bool) -> Callable[[], Tensor]:
    """A whole run of diffusers' scheduler or of ours."""
    import diffusers

    from fastsample.integrations import diffusers as drop_ins

    kind, options, given = CASES[name]
    scheduler = getattr(drop_ins if drop_in else diffusers, kind)(**options)
    if "generator" in inspect.signature(scheduler.step).parameters:
        given = {**given, "generator": torch.Generator(device).manual_seed(0)}
    x, m = (torch.randn(shape, device=device) for _ in range(2))
    return partial(loop, scheduler, x, m, given)


def loop(scheduler: Any, x: Tensor, m: Tensor, given: dict[str, Any]) -> Tensor:
    """The steps of a run as diffusers' pipelines take them."""
    scheduler.set_timesteps(STEPS, device=x.device)
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(m, t, x, **given, return_dict=False)[0]
    return x


if __name__ == "__main__":
    raise SystemExit(main())
