"""Whole runs of every sampler, in small, which the tests of devices and graphs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample import (
    DDIM,
    DDPM,
    LCM,
    TCD,
    Consistency,
    DDIMInverse,
    DPMSolver,
    DynamicThreshold,
    Euler,
    EulerAncestral,
    Heun,
    Sampler,
    Schedule,
    Step,
)
from support.batcher_runs import EVERYTHING, HandMade

SHAPE = (2, 3, 4, 5)
SCHEDULE = Schedule.linear()
X = torch.linspace(-1.5, 1.5, 120).reshape(SHAPE)
MASK = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0])
COND, UNCOND = torch.linspace(-0.4, 0.6, 6).reshape(2, 3, 1, 1), torch.zeros(2, 3, 1, 1)


def model(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    """Of operations that are rounded alike in any batch and on any device of the tests."""
    c = c.to(x.dtype) if isinstance(c, Tensor) else c
    return x * 0.25 + c * x.abs() - (t.to(x.dtype) / 1024).reshape(-1, 1, 1, 1)


def learned(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    m = model(x, t, c)
    return torch.cat([m, (m * 0.5).clamp(-1, 1)], dim=1)


def strided(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    """As models in channels_last return it, which steps copy before they read it."""
    return model(x, t, c).contiguous(memory_format=torch.channels_last)


def never(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("called")


def nudge(step: Step) -> None:
    """A callback that changes the state."""
    step.x.add_(step.x0, alpha=0.01)


class Run(NamedTuple):
    """A sampler, what it samples from, and the options; tensors among them are on the CPU."""

    make: Callable[[], Sampler]
    options: Mapping[str, Any] = MappingProxyType({})
    model: Callable[..., Tensor] = model
    x: tuple[int, ...] | Tensor = SHAPE


GUIDED: dict[str, Any] = {"guidance": 3.0, "cond": {"c": COND}, "uncond": {"c": UNCOND}}
HALF = {"model_dtype": torch.float16}
PAINTED: dict[str, Any] = {"mask": MASK, "known": X}

_RUNS = {
    "ddim": Run(lambda: DDIM(SCHEDULE, steps=3)),
    "ddim-noise": Run(lambda: DDIM(SCHEDULE, steps=3, eta=1.0), {"seed": [5, 2**64 - 1]}),
    "ddim-clip": Run(lambda: DDIM(SCHEDULE, steps=3, clip=1.0)),
    "ddim-threshold": Run(lambda: DDIM(SCHEDULE, steps=3, clip=DynamicThreshold(0.9))),
    "half": Run(lambda: DDIM(SCHEDULE, steps=3, eta=0.5), HALF),
    "ddpm-learned": Run(lambda: DDPM(SCHEDULE, steps=3, variance="learned_range", clip=1.0), model=learned),
    "dpm-solver-2": Run(lambda: DPMSolver(SCHEDULE, steps=4)),
    "dpm-solver-3": Run(lambda: DPMSolver(SCHEDULE, steps=6, order=3)),
    "heun": Run(lambda: Heun(SCHEDULE, steps=3)),
    "euler-scaled": Run(lambda: Euler(SCHEDULE, steps=3)),
    "euler-scaled-half-guided": Run(lambda: EulerAncestral(SCHEDULE, steps=3), {**HALF, **GUIDED}),
    "lcm": Run(lambda: LCM(SCHEDULE, steps=3), {"model_kwargs": {"c": COND}}),
    "tcd": Run(lambda: TCD(SCHEDULE, steps=3)),
    "consistency": Run(lambda: Consistency(sigmas=(80.0, 5.0))),
    "inverse": Run(lambda: DDIMInverse(SCHEDULE, steps=3), x=X),
    "guided": Run(lambda: DDIM(SCHEDULE, steps=3), GUIDED),
    "guided-each": Run(lambda: DDIM(SCHEDULE, steps=3), {**GUIDED, "guidance": [1.0, 7.5]}),
    "guided-rescaled": Run(lambda: DDIM(SCHEDULE, steps=3), {**GUIDED, "guidance_rescale": 0.7}),
    "guided-at-times": Run(lambda: DDIM(SCHEDULE, steps=4, eta=1.0), {**GUIDED, "guidance_interval": (200, 600)}),
    "guided-at-times-strided": Run(
        lambda: DDIM(SCHEDULE, steps=4), {**GUIDED, "guidance_interval": (200, 600)}, model=strided
    ),
    "guided-learned-half": Run(
        lambda: DDPM(SCHEDULE, steps=3, variance="learned_range", clip=1.0), {**HALF, **GUIDED}, model=learned
    ),
    "dpm-solver-3-guided": Run(lambda: DPMSolver(SCHEDULE, steps=6, order=3), GUIDED),
    "inpainting": Run(lambda: DDIM(SCHEDULE, steps=3, eta=1.0), PAINTED),
    "inpainting-guided-half": Run(lambda: DDIM(SCHEDULE, steps=3), {**PAINTED, **GUIDED, **HALF}),
    "correct-x0": Run(lambda: DDIM(SCHEDULE, steps=3, clip=DynamicThreshold(0.9), correct_x0=lambda x0, t: 0.9 * x0)),
    "entries": Run(lambda: EVERYTHING, model=learned),
    "entries-correct-x0": Run(lambda: HandMade(EVERYTHING.table, lambda x0, t: 0.9 * x0), model=learned),
    "strength": Run(lambda: DDIM(SCHEDULE, steps=5, eta=1.0), {"strength": 0.6}, x=X),
    "start-step": Run(lambda: DDIM(SCHEDULE, steps=5, eta=1.0), {"start_step": 2}, x=X),
}
RUNS = {name: run._replace(options={"seed": 7, **run.options}) for name, run in _RUNS.items()}


def moved(value: Any, device: torch.device | str) -> Any:
    """The options with all their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(one, device) for one in value)
    return {name: moved(one, device) for name, one in value.items()} if isinstance(value, Mapping) else value
