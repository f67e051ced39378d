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


def usable_device(device: Any, *, or_meta: bool = False) -> torch.device:
    """The device that this names.

    Args:
        or_meta: whether "meta" counts, where tensors have a shape and no values.

    Raises:
        TypeError: for what is no name of one. ValueError: for a name that torch does not know, and for a device on
            which nothing can be computed here.
    """
    if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
        raise TypeError(f"device must be a torch.device or the name of one, such as 'cpu', got {device!r}")
    try:
        place = torch.device(device)
        if place.type != "cpu":
            torch.empty(0, device=place)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {first_line}") from None
    if place.type == "meta" and not or_meta:
        raise ValueError("device 'meta' cannot be used: nothing is computed there")
    return place


def check_positive(name: str, value: Any) -> None:
    """Raises TypeError for what is no number, ValueError for one that is not positive and finite."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def real_array(name: str, values: Any) -> NDArray[Any]:
    """The values as an array of integers or floats of their own, of any shape. Beyond all floats they are infinite.

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
        array = np.array([_or_infinite(value) for value in array.flat]).reshape(array.shape)  # beyond 64 bits
    if array.dtype.kind not in "iuf":
        kind = "an empty or mixed list" if array.dtype == object else array.dtype
        raise TypeError(f"{name} must hold real numbers, got {kind}")
    return array


def checked_bounds(name: str, bounds: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(low, high), numbers or arrays of shapes that go together, between which float32 values are kept.

    Raises:
        TypeError: for what is no tuple or list, and entries that are no numbers.
        ValueError: for more or less than two, nothing in them, shapes that do not fit, a low above its high, and what
            float32 makes infinite or, where they differ, the same.
    """
    if not isinstance(bounds, tuple | list):
        got = f"{type(bounds).__name__} of shape {tuple(bounds.shape)}" if hasattr(bounds, "shape") else repr(bounds)
        raise TypeError(f"{name} must be a pair (low, high), got {got}")
    if len(bounds) != 2:
        raise ValueError(f"{name} must be (low, high), got {len(bounds)} entries")
    low, high = (real_array(name, one).astype(np.float64) for one in bounds)
    if low.size == 0 or high.size == 0:
        raise ValueError(f"{name}=(low, high) must not be empty, got shapes {low.shape} and {high.shape}")
    try:
        np.broadcast_shapes(low.shape, high.shape)
    except ValueError:
        raise ValueError(f"{name}=(low, high) must be of one shape, got shapes {low.shape} and {high.shape}") from None
    with np.errstate(over="ignore"):
        below, above = low.astype(np.float32), high.astype(np.float32)
    if not (np.isfinite(below).all() and np.isfinite(above).all() and (low <= high).all()):
        raise ValueError(f"{name}=(low, high) must be finite in float32, with low <= high, got {bounds}")
    if ((low < high) & (below == above)).any():
        raise ValueError(f"{name}=(low, high) must still differ in float32 where low < high, got {bounds}")
    return low, high


def _or_infinite(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _without_tensors(name: str, values: Any) -> Any:
    """The values where NumPy can read them: it knows neither gradients nor bfloat16 nor GPUs."""
    if isinstance(values, list | tuple):
        return [_without_tensors(name, value) for value in values]
    if not hasattr(values, "detach"):
        return values
    if getattr(values, "is_meta", False):
        check_has_values(name, values)
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


def not_a_tensor(name: str, value: object) -> TypeError:
    """The error to raise where the value is no tensor. Made here and raised there: hot paths call no check."""
    return TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_has_values(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor on the meta device, which has a shape and no values."""
    if tensor.is_meta:
        raise ValueError(f"{name} lies on the device 'meta', where tensors have a shape and no values")


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
