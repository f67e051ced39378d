"""Runs diffusers' own schedulers, with noise that the test brings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastsample import ops


def start() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def scheduler_of(name: str, **options: Any) -> Any:
    """diffusers' scheduler `name` on Stable Diffusion's schedule, `Schedule.scaled_linear()`."""
    diffusers = pytest.importorskip("diffusers")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**{**schedule, **options})


def step_noise(k: int, shape: torch.Size, seed: int = 5) -> Tensor:
    """z of row k: what fastsample draws itself for that seed."""
    return ops.randn(shape, seed=seed, step=k, stream=1)


def chain(scheduler: Any, model: Callable[..., Tensor], x: Tensor, seed: int = 5, **arguments: Any) -> Tensor:
    """The scheduler's whole loop from x, with step_noise(k) in place of torch's generator."""
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # which flows do not have
    for k, t in enumerate(scheduler.timesteps):
        m = model(scaled(x, t), t.expand(len(x)))
        drawn = patch.object(
            sys.modules[type(scheduler).__module__],
            "randn_tensor",
            lambda shape, *_, dtype, k=k, **__: step_noise(k, shape, seed).to(dtype),
            create=True,
        )
        with drawn:
            x = scheduler.step(m, t, x, **arguments).prev_sample
    return x
