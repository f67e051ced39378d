"""Schedulers of diffusers whose step is one pass over memory: put in place of theirs, they compute the same.

Each class derives from the one of diffusers that has its name, and changes nothing but the step and what adds noise.
"""

from __future__ import annotations

import copy
from typing import Any

from diffusers import SchedulerMixin

from fastsample.integrations.diffusers.ddim import DDIMInverseScheduler, DDIMScheduler
from fastsample.integrations.diffusers.ddpm import DDPMScheduler
from fastsample.integrations.diffusers.distilled import CMStochasticIterativeScheduler, LCMScheduler, TCDScheduler
from fastsample.integrations.diffusers.flow import FlowMatchEulerDiscreteScheduler
from fastsample.integrations.diffusers.multistep import DPMSolverMultistepScheduler
from fastsample.integrations.diffusers.sigmas import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from fastsample.integrations.diffusers.unipc import UniPCMultistepScheduler

_CLASSES: tuple[Any, ...] = (
    *(DDIMScheduler, DDIMInverseScheduler, DDPMScheduler, LCMScheduler, TCDScheduler, CMStochasticIterativeScheduler),
    *(EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler),
    FlowMatchEulerDiscreteScheduler,
)
__all__ = ["SchedulerMixin", "same_as", *sorted(kind.__name__ for kind in _CLASSES)]


def same_as(scheduler: Any) -> SchedulerMixin | None:
    """The drop-in of a live scheduler of diffusers, with its configuration and in its state, which computes the same.

    It repeats diffusers' mistakes (compat="diffusers").

    Returns:
        None for a class without one, and for one of your own that derives from one of diffusers'.

    Raises:
        ValueError: for an option that is not covered.

    Example:
        >>> import diffusers
        >>> type(same_as(diffusers.DDIMScheduler()))
        <class 'fastsample.integrations.diffusers.DDIMScheduler'>
        >>> same_as(diffusers.PNDMScheduler()) is None
        True
    """
    for kind in _CLASSES:
        if type(scheduler) is kind._peer:
            same = kind.from_config(scheduler.config, compat="diffusers")
            state = {name: copy.copy(value) for name, value in vars(scheduler).items() if name != "_internal_dict"}
            vars(same).update(state)
            found: SchedulerMixin = same
            return found
    return None
