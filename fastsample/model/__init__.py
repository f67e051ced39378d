"""Any noise predictor as one call: a tensor in, a tensor out."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.caller import warn
from fastsample.model.called_modules import attribute, called_modules
from fastsample.model.placement import COMPUTED_IN, parts_of, placement, stated_dtype
from fastsample.schedule import Schedule

Model = Callable[..., Any]

_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # behave otherwise in training
_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTED_IN)
# By id: models may define equality. What is gone leaves the dict, so that a new model of the same id is new.
_warned_of_training: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class Predictor:
    """`model(x, t, **kwargs)`, its output unwrapped to a tensor.

    The model may return a tensor, a tuple or list whose first entry is one, or an object with `.sample` (diffusers). It
    must leave x and t as they are; gradients that it lets flow to x itself end with the call.

    Attributes:
        known_dtype: what the model wants to be given: as asked, else what it states, else that of the modules that it
            calls (see fastsample.model.placement); None for a function that calls none.
        dtype: what it is given: known_dtype, else float32.
        device: that of the modules that it calls, or None without any.
        model: as given.
        guided: whether runs are guided: then outputs for one half and for both would fit a step, so that the batch of
            every output is compared with that of x.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None = None) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **model_kwargs), got {type(model).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in COMPUTED_IN):
            raise TypeError(
                f"model_dtype must be a floating-point torch.dtype that torch computes in ({_NAMES}), got {dtype!r}"
            )
        modules = called_modules(model)
        wanted, self.device = placement(modules) if modules else (None, None)
        self.known_dtype = dtype or _stated_outside(model) or wanted
        self.dtype = self.known_dtype or torch.float32
        self.guided = False
        self.model, self._modules = model, tuple(map(weakref.ref, modules))
        if modules:
            warn_of_training(modules)

    def __call__(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        version, time_version = x._version, t._version
        output = self.model(x, t, **kwargs)
        if t._version != time_version:
            raise ValueError(_written("t"))
        return self.checked(output, x, version)

    def checked(self, output: Any, x: Tensor, version: int) -> Tensor:
        """What the model has returned for x as a tensor, once x is known to be as it was at this version."""
        if x._version != version:
            raise ValueError(_written("x"))
        if x.requires_grad and x.is_leaf:
            # The model asked for it. x is the loop's buffer: gradients of this row must not add to those of the next.
            x.requires_grad_(False).grad = None
        if not isinstance(output, Tensor):
            output = _tensor_of(output)
        if self.guided and output.shape != x.shape:
            _check_batch(output, x)
        return output

    def check_times(self, times: Tensor, version: int) -> None:
        """Raises where the model has written to the times that it was given since this version."""
        if times._version != version:
            raise ValueError(_written("t"))

    def warn_of_training(self) -> None:
        """Warns as at construction, for a run that begins later."""
        warn_of_training(module for reference in self._modules if (module := reference()) is not None)


def unwrapped(output: Any) -> Any:
    """The tensor in an object with `.sample` (diffusers) or at the head of a tuple or list; anything else as it is."""
    inner = None if isinstance(output, Tensor) else getattr(output, "sample", None)
    if inner is None and isinstance(output, tuple | list) and output:
        inner = output[0]
    return inner if isinstance(inner, Tensor) else output


_assumed = functools.cache(Schedule.linear)


def schedule_of(model: Model, schedule: Schedule | None) -> Schedule:
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
            f"Schedule.from_alphas_cumprod(scheduler.alphas_cumprod); got {type(chosen).__name__}"
        )
    return chosen


def decoder_dtype(decode: Callable[[Tensor], Any]) -> torch.dtype | None:
    """The dtype that the modules which `decode` calls want, None where it calls none or they differ.

    For `decode=vae.decode` and `decode=lambda x: vae.decode(x / s).sample` it is that of the VAE.
    """
    return _stated_outside(decode) or placement(called_modules(decode))[0]


def _stated_outside(model: Model) -> torch.dtype | None:
    """The `dtype` attribute of a callable that is no torch module."""
    return None if isinstance(model, nn.Module) else stated_dtype(model)


def _tensor_of(output: Any) -> Tensor:
    inner = unwrapped(output)
    if not isinstance(inner, Tensor):
        raise TypeError(
            "the model must return a tensor, a tuple that starts with one, or an object with .sample; got "
            f"{type(inner).__name__}"
        )
    return inner


def _written(name: str) -> str:
    return (
        f"the model wrote to its argument {name} in place, which is the loop's own buffer: let it work on a copy, such "
        f"as {name} = {name}.clone(), or use operations without a trailing underscore"
    )


def _check_batch(output: Tensor, x: Tensor) -> None:
    if output.shape[:1] != x.shape[:1]:
        raise ValueError(
            "the model must return an output for every sample that it is given, with twice the batch under guidance: "
            f"{x.shape[0]} in this row, got shape {tuple(output.shape)}"
        )


def warn_of_training(modules: Iterable[nn.Module]) -> None:
    """Warns once of every module that is in training mode, or holds a dropout or batch norm that is."""
    for module in modules:
        if _warned_of_training.get(id(module)) is module or (culprit := _in_training(module)) is None:
            continue
        _warned_of_training[id(module)] = module
        name = type(module).__name__
        what = "is in training mode" if culprit is module else f"has a {type(culprit).__name__} in training mode"
        warn(f"{name} {what}: dropout and batch statistics would disturb the samples; call .eval() on it first")


def _in_training(module: nn.Module) -> nn.Module | None:
    """The module itself where it is in training mode, else the first one in it that is and behaves otherwise then."""
    if module.training:
        return module
    for one in parts_of(module):
        if one.training and isinstance(one, _MODAL):
            return one
    return None
