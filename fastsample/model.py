"""Any noise predictor as one call: a tensor in, a tensor out."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsample.schedule import Schedule

Model = Callable[..., Any]


class Predictor:
    """`model(x, t, **kwargs)`, its output unwrapped to a tensor.

    The model may return a tensor, a tuple or list whose first entry is one, or an object with `.sample` (diffusers).

    Attributes:
        dtype: what the model is given: as asked, else that of its first floating-point parameter, else float32.
        device: that of its first parameter, or None for a model without parameters.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None = None) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **model_kwargs), got {type(model).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"model_dtype must be a floating-point torch.dtype, got {dtype!r}")
        parameters = model.parameters if isinstance(model, torch.nn.Module) else list
        floating = (parameter.dtype for parameter in parameters() if parameter.is_floating_point())
        self.dtype = dtype or next(floating, torch.float32)
        self.device = next((parameter.device for parameter in parameters()), None)
        self._model = model

    def __call__(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        output = self._model(x, t, **kwargs)
        if isinstance(output, Tensor):
            return output
        inner = unwrapped(output)
        if not isinstance(inner, Tensor):
            raise TypeError(
                "the model must return a tensor, a tuple that starts with one, or an object with .sample; got "
                f"{type(inner).__name__}"
            )
        return inner


def unwrapped(output: Any) -> Any:
    """The tensor in an object with `.sample` (diffusers) or at the head of a tuple or list; anything else as it is."""
    inner = None if isinstance(output, Tensor) else getattr(output, "sample", None)
    if inner is None and isinstance(output, tuple | list) and output:
        inner = output[0]
    return inner if isinstance(inner, Tensor) else output


_assumed = functools.cache(Schedule.linear)


def schedule_of(model: Model, schedule: Schedule | None) -> Schedule:
    """The given schedule, else `model.schedule`, else Schedule.linear(1000), with a warning for a torch module."""
    chosen = schedule if schedule is not None else getattr(model, "schedule", None)
    if chosen is None:
        if isinstance(model, torch.nn.Module):
            warnings.warn(
                f"{type(model).__name__} has no .schedule: Schedule.linear(1000) is assumed; give schedule=, such as "
                "Schedule.from_alphas_cumprod(scheduler.alphas_cumprod)",
                stacklevel=3,
            )
        return _assumed()
    if not isinstance(chosen, Schedule):
        name = "schedule" if schedule is not None else "model.schedule"
        raise TypeError(
            f"{name} must be a fastsample.Schedule, such as Schedule.cosine() or "
            f"Schedule.from_alphas_cumprod(scheduler.alphas_cumprod); got {type(chosen).__name__}"
        )
    return chosen
