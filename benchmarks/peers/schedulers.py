"""A live scheduler's own chain with noise that is brought, in float32 as it computes or in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastsample import ops


class _Doubled:
    """torch, but that float32 names float64: for a scheduler that casts its state to float32 in every step."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def chain(
    scheduler: Any, model: Callable[..., Tensor], x: Tensor, *, seed: int, double: bool = False, **arguments: Any
) -> Tensor:
    """The scheduler's steps from x, with fastsample's own noise of the seed in place of torch's.

    Args:
        scheduler: with its timesteps set.
        x: in the dtype that the chain is to have; with `double` float64, and the scheduler's levels are turned into it.
        **arguments: of its `step`.
    """
    module = sys.modules[type(scheduler).__module__]
    with ExitStack() as stack:
        if double:
            stack.enter_context(in_float64(scheduler))
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # which flows do not have
        for k, t in enumerate(scheduler.timesteps):
            m = model(scaled(x, t), t.expand(len(x)))
            noise = partial(_noise, seed, k)
            with patch.object(module, "randn_tensor", noise, create=True):
                x = scheduler.step(m, t, x, **arguments).prev_sample
    return x


@contextmanager
def in_float64(scheduler: Any) -> Iterator[None]:
    """In it the steps of a scheduler of diffusers, whose levels it turns into float64, compute in that."""
    levels_to_float64(scheduler)
    with patch.object(sys.modules[type(scheduler).__module__], "torch", _Doubled()):
        yield


def levels_to_float64(scheduler: Any) -> None:
    """Gives a scheduler alpha bars and sigmas of the same values in float64."""
    for name, value in list(vars(scheduler).items()):
        if name != "timesteps" and isinstance(value, Tensor) and value.is_floating_point():
            setattr(scheduler, name, value.double())


def _noise(seed: int, k: int, shape: torch.Size, *_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
    return ops.randn(shape, seed=seed, step=k, stream=1).to(dtype)
