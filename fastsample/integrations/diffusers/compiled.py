"""A scheduler's methods as torch.compile sees them: registered ops, in which the scheduler itself runs.

So a graph holds nothing of a scheduler's timesteps and counts, and no change of them makes it compiled again.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample.ops.tracing import constant_when_traced

# Arguments of steps that are tensors or integers, and that a graph has no place for; all others are numbers.
_TENSORS = ("variance_noise", "seed", "index")
_LEFT_OUT = ("generator", "per_token_timesteps")


class Call(NamedTuple):
    """A method of a scheduler.

    Attributes:
        scheduler: a weak reference to it.
        method: takes the scheduler and tensors.
        names: of the numbers that it takes beside.
    """

    scheduler: weakref.ref[Any]
    method: Callable[..., Any]
    names: tuple[str, ...]


_calls: list[Call] = []


def in_one_op(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of a class, which compiled is one op that has no gradients."""
    _, *names = inspect.signature(step).parameters

    @functools.wraps(step)
    def own(self: Any, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            return step(self, *args, **options)
        given = dict(zip(names, args, strict=False)) | options
        m, timestep, x = (given.pop(name) for name in ("model_output", "timestep", "sample"))
        dictionary = given.pop("return_dict", True)
        for name in _LEFT_OUT:
            if given.pop(name, None) is not None:
                raise ValueError(f"compiled, a step takes no {name}: give seed, or variance_noise where it is taken")
        if torch.is_grad_enabled() and (m.requires_grad or x.requires_grad):
            raise ValueError("compiled, a step has no gradients: call it under torch.no_grad()")
        tensors = [_as_tensor(given.pop(name, None), torch.int64) for name in _TENSORS]
        floats = {name: value for name, value in given.items() if isinstance(value, int | float)}
        number = _number(self, step, tuple(floats))
        values = [_as_tensor(value, torch.float64) for value in floats.values()]
        out = torch.ops.fastsample.scheduler_step(m, _as_tensor(timestep, torch.float64), x, number, values, *tensors)
        return self.output(*out) if dictionary else tuple(out)

    return own


def input_in_one_op(scale: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same for what scales a model's input."""

    @functools.wraps(scale)
    def own(self: Any, sample: Tensor, timestep: float | Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return scale(self, sample, timestep)
        time = _as_tensor(timestep, torch.float64)
        scaled: Tensor = torch.ops.fastsample.scheduler_input(sample, time, _number(self, scale, ()))
        return scaled

    return own


def _as_tensor(value: Any, dtype: torch.dtype) -> Any:
    """Numbers as tensors, whose values a graph does not depend on."""
    return value if value is None or isinstance(value, Tensor) else torch.full((), value, dtype=dtype)


@constant_when_traced  # Dynamo guards on which scheduler it is
def _number(scheduler: Any, method: Callable[..., Any], names: tuple[str, ...]) -> int:
    """What a graph knows a call by."""
    call = Call(weakref.ref(scheduler), method, names)
    if call not in _calls:
        _calls.append(call)
    return _calls.index(call)


def _scheduler(number: int) -> Any:
    scheduler = _calls[number].scheduler()
    if scheduler is None:
        raise ValueError("the scheduler of this compiled function is gone: keep it as long as the function")
    return scheduler


def _step(
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    number: int,
    values: Sequence[Tensor],
    noise: Tensor | None,
    seed: Tensor | None,
    index: Tensor | None,
) -> Sequence[Tensor]:
    call = _calls[number]
    options: dict[str, Any] = {name: float(value) for name, value in zip(call.names, values, strict=True)}
    if noise is not None:
        options["variance_noise"] = noise
    for name, tensor in (("seed", seed), ("index", index)):
        if tensor is not None:
            options[name] = tensor if tensor.ndim else int(tensor)
    given = model_output, _number_of(timestep), sample
    return list(call.method(_scheduler(number), *given, return_dict=False, **options))


def _like_a_step(model_output: Tensor, timestep: Tensor, sample: Tensor, number: int, *_: object) -> Sequence[Tensor]:
    dtypes = _scheduler(number).output_dtypes(model_output.dtype, sample.dtype)
    return [torch.empty_like(sample, dtype=dtype, memory_format=torch.contiguous_format) for dtype in dtypes]


def _input(sample: Tensor, timestep: Tensor, number: int) -> Tensor:
    scaled: Tensor = _calls[number].method(_scheduler(number), sample, _number_of(timestep))
    return scaled


def _like_sample(sample: Tensor, timestep: Tensor, number: int) -> Tensor:
    return torch.empty_like(sample)


def _number_of(timestep: Tensor) -> Any:
    """Timesteps that were numbers as such again; schedulers take whole ones for whole, and refuse some."""
    if timestep.dtype != torch.float64 or not timestep.is_cpu or timestep.ndim:
        return timestep
    value = float(timestep)
    return int(value) if value.is_integer() else value


_TAKES = "Tensor sample, int number, Tensor[] values, Tensor? noise, Tensor? seed, Tensor? index"
_step_op = torch.library.custom_op(
    "fastsample::scheduler_step",
    _step,
    mutates_args=(),
    schema=f"(Tensor model_output, Tensor timestep, {_TAKES}) -> Tensor[]",
)
_step_op.register_fake(_like_a_step)
_input_op = torch.library.custom_op(
    "fastsample::scheduler_input",
    _input,
    mutates_args=(),
    schema="(Tensor sample, Tensor timestep, int number) -> Tensor",
)
_input_op.register_fake(_like_sample)
