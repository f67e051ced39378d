"""The DDIM step as others have it. Where a peer is absent its function returns None and a note is printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

STEPS, ROW = 50, 25  # a step from the middle of the run that diffusers' examples make


def diffusers_scheduler(steps: int = STEPS, *, clip: bool = False) -> Any:
    """diffusers' DDIMScheduler with its defaults but for clip_sample, ready for `steps` steps."""
    scheduler_class = _diffusers_class()
    if scheduler_class is None:
        return None
    scheduler = scheduler_class(clip_sample=clip)
    scheduler.set_timesteps(steps)
    return scheduler


@cache
def _diffusers_class() -> Any:
    # Cached for the note, which is to be read once, not for every shape.
    try:
        from diffusers import DDIMScheduler
    except ImportError as error:
        print(f"diffusers is left out, it cannot be imported: {error}")
        return None
    return DDIMScheduler


def diffusers_step(x: Tensor, m: Tensor, *, eta: float = 0.0, clip: bool = False) -> Callable[[], Tensor] | None:
    """One `DDIMScheduler.step`, the timestep a tensor as its pipelines pass it."""
    scheduler = diffusers_scheduler(clip=clip)
    if scheduler is None:
        return None
    t = scheduler.timesteps[ROW]
    return lambda: scheduler.step(m, t, x, eta=eta).prev_sample


def compiled_step(x: Tensor, m: Tensor) -> Callable[[], Tensor] | None:
    """A DDIM step under torch.compile; its coefficients are tensors, so that no step of a run compiles anew."""
    torch.compiler.reset()
    compiled = torch.compile(_ddim, fullgraph=True, dynamic=False)
    coefficients = [torch.tensor(value) for value in (0.8, 0.6, 0.9, 0.4359)]
    try:
        compiled(x, m, *coefficients)
    except Exception as error:  # whatever its toolchain lacks, the other rows are worth having
        print(f"torch.compile is left out, it failed: {str(error).strip().splitlines()[0]}")
        return None
    return lambda: compiled(x, m, *coefficients)


def _ddim(x: Tensor, m: Tensor, alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor) -> Tensor:
    x0 = (x - sigma * m) / alpha
    return next_alpha * x0 + next_sigma * m
