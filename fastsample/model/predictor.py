"""A model as a sampler calls it: given its dtype, watched, and its output unwrapped."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.hints import is_pipeline, of_diffusers
from fastsample.model.called_modules import called_modules
from fastsample.model.dtype import COMPUTED_IN, stated_outside
from fastsample.model.output import check_batch, tensor_of
from fastsample.model.placement import placement
from fastsample.model.training import modal_parts, warn_of_training
from fastsample.versions import version_of

Model = Callable[..., Any]

_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTED_IN)


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
        if not callable(model) or (not isinstance(model, nn.Module) and is_pipeline(model)):
            got = f"{type(model).__name__}{of_diffusers(model)}"
            raise TypeError(f"model must be callable as model(x, t, **model_kwargs), got {got}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in COMPUTED_IN):
            raise TypeError(
                f"model_dtype must be a floating-point torch.dtype that torch computes in ({_NAMES}), got {dtype!r}"
            )
        modules = called_modules(model)
        wanted, self.device = placement(modules) if modules else (None, None)
        self.known_dtype = dtype or stated_outside(model) or wanted
        self.dtype = self.known_dtype or torch.float32
        self.guided = False
        self.model, self._modules = model, tuple(map(weakref.ref, modules))
        self._modal: tuple[weakref.ref[nn.Module], ...] | None = None
        if modules:
            warn_of_training(modules)

    def __call__(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        version, time_version = version_of(x), version_of(t)
        output = self.model(x, t, **kwargs)
        if version_of(t) != time_version:
            raise ValueError(_written("t"))
        return self.checked(output, x, version)

    def checked(self, output: Any, x: Tensor, version: int) -> Tensor:
        """What the model has returned for x as a tensor, once x is known to be as it was at this version."""
        if version_of(x) != version:
            raise ValueError(_written("x"))
        if x.requires_grad and x.is_leaf:
            # The model asked for it. x is the loop's buffer: gradients of this row must not add to those of the next.
            x.requires_grad_(False).grad = None
        if not isinstance(output, Tensor):
            output = tensor_of(output)
        if self.guided and output.shape != x.shape:
            check_batch(output, x)
        return output

    def check_times(self, times: Tensor, version: int) -> None:
        """Raises where the model has written to the times that it was given since this version."""
        if version_of(times) != version:
            raise ValueError(_written("t"))

    def warn_of_training(self) -> None:
        """Warns as at construction, for a run that begins later."""
        # To walk through a network takes longer than a step.
        if self._modal is None:
            self._modal = modal_parts(self._living())
        if any(part.training for reference in self._modal if (part := reference()) is not None):
            warn_of_training(self._living())

    def _living(self) -> list[nn.Module]:
        return [module for reference in self._modules if (module := reference()) is not None]


def _written(name: str) -> str:
    return (
        f"the model wrote to its argument {name} in place, which is the loop's own buffer: let it work on a copy, such "
        f"as {name} = {name}.clone(), or use operations without a trailing underscore"
    )
