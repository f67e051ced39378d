"""The noise schedule that a model was trained with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastsample.caller import warn
from fastsample.hints import of_diffusers
from fastsample.model.called_modules import attribute, called_modules
from fastsample.schedule import Schedule

_assumed = functools.cache(Schedule.linear)


def schedule_of(model: Callable[..., Any], schedule: Schedule | None) -> Schedule:
    """The given schedule, else the model's, else Schedule.linear(1000), with a warning for a torch module.

    The model's is its attribute `schedule`, else that of the modules that it calls (fastsample.model.called_modules).
    """
    chosen = schedule if schedule is not None else attribute(model, "schedule", Schedule)
    if chosen is None:
        if modules := called_modules(model):
            warn(
                f"{type(modules[0]).__name__} has no .schedule: Schedule.linear(1000) is assumed; give schedule=, such "
                "as Schedule.from_alphas_cumprod(scheduler.alphas_cumprod)"
            )
        return _assumed()
    if not isinstance(chosen, Schedule):
        name = "schedule" if schedule is not None else "model.schedule"
        raise TypeError(
            f"{name} must be a fastsample.Schedule, such as Schedule.cosine() or "
            f"Schedule.from_alphas_cumprod(scheduler.alphas_cumprod); got {type(chosen).__name__}{of_diffusers(chosen)}"
        )
    return chosen
