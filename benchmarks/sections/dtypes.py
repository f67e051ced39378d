"""Half-precision models beside a float32 state: the step reads m and writes the next input in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.repeatable import repeatable
from benchmarks.cases.steps import DDIM_STEP, Operands
from benchmarks.cases.torch_steps import ddim
from benchmarks.common.harness import Candidate, measure, ratio
from benchmarks.common.memory import copy, triad
from benchmarks.common.options import Run, Shape, label
from benchmarks.common.report import OURS, Row, against, percent, rows_of, table
from benchmarks.peers.diffusers import diffusers_step
from benchmarks.peers.plain_torch import compiled
from fastsample.ops.step import operands as step_operands
from fastsample.ops.step.prepared import StepPlan

DTYPES = (torch.float16, torch.bfloat16)


def section(run: Run) -> list[Row]:
    """DDIM with eta 0 in the larger shapes."""
    rows: list[Row] = []
    for dtype in DTYPES:
        name = f"step {DDIM_STEP.name}, {str(dtype)[6:]} model"
        for shape in run.shapes[-3:]:
            timings = measure(_candidates(run, shape, dtype), run.rounds, clock=run.clock)
            bound = "triad" if "triad" in timings else "copy"
            new_rows = rows_of(name, label(shape), timings, {**against(OURS, timings), OURS: bound})
            # A copy moves 8 bytes an element.
            share = percent(ratio(timings[bound], timings[OURS]), 1.0 if bound == "triad" else 12 / 8)
            print(f"{table(new_rows)}\n  {OURS}: {share} of the {bound}'s speed by counted bytes", flush=True)
            rows += new_rows
    return rows


def _candidates(run: Run, shape: Shape, dtype: torch.dtype) -> list[Candidate]:
    x, other = (torch.randn(shape, device=run.device) for _ in range(2))
    m, model_input = other.to(dtype), torch.empty_like(x, dtype=dtype)
    operands = Operands(m, ())
    plan = StepPlan(step_operands.Operands(x, repeatable(DDIM_STEP.table), out=x, input_out=model_input))
    arguments = DDIM_STEP.plain_arguments(x, operands)
    step = diffusers_step(DDIM_STEP, x, operands)
    peers: dict[str, Callable[[], object] | None] = {
        "diffusers": None if step is None else lambda: step().to(dtype),
        "torch.compile": compiled(_ddim_and_input, arguments) if not run.quick else None,
    }
    # x read and written in 4 bytes, m and the next input in 2 each: as much as three float32 streams.
    traffic = 12 * x.numel()
    return [
        *(Candidate(name, call, bytes=traffic) for name, call in peers.items() if call is not None),
        Candidate(OURS, partial(plan, m, DDIM_STEP.row), bytes=traffic),
        Candidate("triad", triad(x, [other]), bytes=traffic)
        if x.is_cpu
        else Candidate("copy", copy(x, other), bytes=8 * x.numel()),
    ]


def _ddim_and_input(x: Tensor, m: Tensor, p: Tensor, q: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    x = ddim(x, m.float(), p, q, b, d)
    return x, x.to(m.dtype)
