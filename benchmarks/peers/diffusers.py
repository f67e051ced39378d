"""Steps and whole runs of diffusers' schedulers. Where diffusers is absent they are None and a note is printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks.cases.methods import Method
from benchmarks.cases.steps import SCHEDULE, Case, Operands
from fastsample import Schedule


def diffusers_step(case: Case, x: Tensor, operands: Operands) -> Callable[[], Tensor] | None:
    """One `scheduler.step`, the timestep a tensor as its pipelines pass it; returns x'.

    The schedulers of multistep methods count their steps: they are set back to the same row before each.
    """
    scheduler = case.method.theirs(SCHEDULE, case.steps)
    if scheduler is None:
        return None
    t, row, m, options = scheduler.timesteps[case.row], case.row, operands.m, case.method.step_options
    if operands.history:
        scheduler.model_outputs = [None, *(one.clone() for one in reversed(operands.history))]
        scheduler.lower_order_nums = len(scheduler.model_outputs)

    def step(output: Tensor = m) -> Tensor:
        scheduler._step_index = row
        return scheduler.step(output, t, x, **options).prev_sample

    def guided_step(w: float) -> Tensor:
        unconditional, conditional = m.chunk(2)
        return step(unconditional + w * (conditional - unconditional))

    return step if case.guidance is None else partial(guided_step, case.guidance)


def diffusers_loop(
    method: Method, schedule: Schedule, steps: int, model: Callable[[Tensor, Tensor], Tensor], start: Tensor
) -> Callable[[], Tensor] | None:
    """A whole run from `start`; `model` is given t as the scheduler has it, 0-d. None where diffusers is absent.

    set_timesteps belongs to the run, as it does in every pipeline: it also sets the multistep schedulers back.
    """
    scheduler = method.theirs(schedule, steps)
    if scheduler is None:
        return None

    def loop() -> Tensor:
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, **method.step_options).prev_sample
        return x

    return loop
