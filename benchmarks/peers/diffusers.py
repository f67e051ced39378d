"""A case's step as others have it. Where a peer is absent its function returns None and a note is printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.cases import SCHEDULE, Case, Operands


def diffusers_step(case: Case, x: Tensor, operands: Operands) -> Callable[[], Tensor] | None:
    """One `scheduler.step`, the timestep a tensor as its pipelines pass it; returns x'.

    The schedulers of multistep methods count their steps: they are set back to the same row before each.
    """
    scheduler = case.pair.theirs(SCHEDULE, case.steps)
    if scheduler is None:
        return None
    t, row, m, options = scheduler.timesteps[case.row], case.row, operands.m, case.pair.step_options
    if operands.history:
        scheduler.model_outputs = [None, operands.history[-1].clone()]
        scheduler.lower_order_nums = 2

    def step(output: Tensor = m) -> Tensor:
        scheduler._step_index = row
        return scheduler.step(output, t, x, **options).prev_sample

    def guided_step(w: float) -> Tensor:
        unconditional, conditional = m.chunk(2)
        return step(unconditional + w * (conditional - unconditional))

    return step if case.guidance is None else partial(guided_step, case.guidance)


def compiled(step: Callable[..., object], arguments: list[Tensor]) -> Callable[[], object] | None:
    """A plain step under torch.compile, already compiled for these arguments."""
    torch.compiler.reset()
    made = torch.compile(step, fullgraph=True, dynamic=False)
    try:
        made(*arguments)
    except Exception as error:  # whatever its toolchain lacks, the other rows are worth having
        print(f"torch.compile is left out, it failed: {str(error).strip().splitlines()[0]}")
        return None
    return lambda: made(*arguments)
