"""What callers give: numbers, shapes and tensors are checked here, by errors that name the argument."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.hints import meant_value

Name = TypeVar("Name", bound=str)


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """The value as an int: Python's and NumPy's integers, and arrays and tensors that hold one.

    Raises:
        TypeError: for anything else, bool and whole floats included. ValueError: outside low .. high.
    """
    try:
        number = operator.index(None if _is_bool(value) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    if high is not None and number > high:
        raise ValueError(f"{name} must be at most {high}, got {number}")
    return number


def real(name: str, value: Any) -> float:
    """The value as a float: Python's and NumPy's real numbers, and arrays and tensors that hold one.

    Raises:
        TypeError: for anything else, bool and complex numbers included. ValueError: for integers beyond all floats.
    """
    if type(value) is float:  # what a step's options nearly always are
        return value
    number = _number(name, value)
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} is beyond what a float holds, got {number!r}") from None


def check_number(name: str, value: Any) -> None:
    """Raises TypeError for what `real` takes for no number. Its size is not looked at."""
    _number(name, value)


def one_of(name: str, value: Any, choices: Sequence[Name]) -> Name:
    """The same value. Raises ValueError for what is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise no_such_name(name, value, choices)
    return value  # type: ignore[return-value]  # it is one of them


def no_such_name(name: str, value: object, choices: Sequence[str]) -> ValueError:
    """The error to raise for a value that is none of the choices; it says which one another library's word stands for.

    Example:
        >>> str(no_such_name("prediction", "v_prediction", ("epsilon", "v")))
        "prediction must be one of epsilon, v, got 'v_prediction'; did you mean 'v'?"
    """
    return ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{meant_value(name, value, choices)}")


def usable_device(device: str | torch.device) -> torch.device:
    """The device. Raises ValueError where nothing can be computed there."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).partition(chr(10))[0]}") from None
    if place.type == "meta":
        raise ValueError("device 'meta' cannot be used: nothing is computed there")
    return place


def check_positive(name: str, value: Any) -> None:
    """Raises TypeError for what is no number, ValueError for one that is not positive and finite."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def real_array(name: str, values: Any) -> NDArray[Any]:
    """The values as an array of integers or floats of their own, of any shape.

    Raises:
        TypeError: for what is no array of real numbers: bool, complex numbers, text, other objects.
        ValueError: for lists of unequal lengths.
    """
    values = _without_tensors(name, values)
    try:
        array = np.array(values)
    except ValueError:
        raise ValueError(f"{name} must be an array of numbers, got {values!r}") from None
    if array.dtype == object and all(isinstance(value, numbers.Real) and not _is_bool(value) for value in array.flat):
        array = array.astype(np.float64)  # integers beyond 64 bits
    if array.dtype.kind not in "iuf":
        kind = "an empty or mixed list" if array.dtype == object else array.dtype
        raise TypeError(f"{name} must hold real numbers, got {kind}")
    return array


def _without_tensors(name: str, values: Any) -> Any:
    """The values where NumPy can read them: it knows neither gradients nor bfloat16 nor GPUs."""
    if isinstance(values, list | tuple):
        return [_without_tensors(name, value) for value in values]
    if not hasattr(values, "detach"):
        return values
    try:
        tensor = values.detach().cpu().resolve_neg()
        narrow = tensor.is_floating_point() and tensor.element_size() < 4
        return (tensor.float() if narrow else tensor).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} must hold real numbers, and this tensor cannot be read: {error}") from None


def checked_shape(name: str, shape: Sequence[int]) -> torch.Size:
    """The shape of a batch: a first axis of samples, and nothing zero.

    Raises:
        TypeError: for what is no sequence of ints. ValueError: for no axis, a size below 1, and one beyond 63 bits.
    """
    try:
        size = torch.Size(shape)
        if not isinstance(shape, torch.Size) and any(isinstance(length, bool) for length in shape):
            raise TypeError
    except (TypeError, OverflowError):
        got = shape if isinstance(shape, list | tuple) else type(shape).__name__
        raise TypeError(f"{name} must be a sequence of ints, got {got}") from None
    if len(size) == 0 or min(size) < 1:
        raise ValueError(f"{name} must have a first axis of samples and no zero, got {tuple(size)}")
    if not torch.compiler.is_compiling() and max(size) >= 2**63:  # which torch.Size lets pass
        raise ValueError(f"{name} is beyond all memory: {tuple(size)}")
    return size


def checked_device(device: Any) -> torch.device:
    """The device that this names.

    Raises:
        TypeError: for what is no name of one. ValueError: for a name that torch does not know.
    """
    if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
        raise TypeError(f"device must be a torch.device or the name of one, such as 'cpu', got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        if isinstance(device, str):
            raise ValueError(f"device must be one that torch knows, got {device!r}: {error}") from None
        raise  # of a number, where there is no GPU


def not_a_tensor(name: str, value: object) -> TypeError:
    """The error to raise where the value is no tensor. Made here and raised there: hot paths call no check."""
    return TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: object) -> None:
    """Raises TypeError unless this is a floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def _number(name: str, value: Any) -> numbers.Real:
    """The real number itself, out of an array or tensor that holds one."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
