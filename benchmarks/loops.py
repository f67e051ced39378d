"""The sampling loop around diffusers' schedulers, as its pipelines write it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.pairs import Pair
from fastsample import Schedule


def diffusers_loop(
    pair: Pair, schedule: Schedule, steps: int, model: Callable[[Tensor, Tensor], Tensor], start: Tensor
) -> Callable[[], Tensor] | None:
    """A whole run from `start`; `model` is given t as the scheduler has it, 0-d. None where diffusers is absent.

    set_timesteps belongs to the run, as it does in every pipeline: it also sets the multistep schedulers back.
    """
    scheduler = pair.theirs(schedule, steps)
    if scheduler is None:
        return None

    def loop() -> Tensor:
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, **pair.step_options).prev_sample
        return x

    return loop
