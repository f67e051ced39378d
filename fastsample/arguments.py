"""Numbers that callers give: checked, with an error that names the argument, and as Python's or NumPy's own."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """The value as an int: Python's and NumPy's integers, and arrays and tensors that hold one.

    Raises:
        TypeError: for anything else, bool and whole floats included. ValueError: outside low .. high.
    """
    try:
        found = operator.index(None if _is_bool(value) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if low is not None and found < low:
        raise ValueError(f"{name} must be at least {low}, got {found}")
    if high is not None and found > high:
        raise ValueError(f"{name} must be at most {high}, got {found}")
    return found


def real(name: str, value: Any) -> float:
    """The value as a float: Python's and NumPy's real numbers, and arrays and tensors that hold one.

    Raises:
        TypeError: for anything else, bool and complex numbers included. ValueError: for integers beyond all floats.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is beyond what a float holds, got {value!r}") from None


def real_array(name: str, values: Any) -> NDArray[Any]:
    """The values as an array of integers or floats of their own, of any shape.

    Raises:
        TypeError: for what is no array of real numbers: bool, complex numbers, text, other objects.
        ValueError: for lists of unequal lengths.
    """
    if hasattr(values, "detach"):  # NumPy knows neither gradients nor bfloat16 nor GPUs
        values = values.detach().cpu().resolve_neg()
        narrow = values.is_floating_point() and values.element_size() < 4
        values = (values.float() if narrow else values).numpy()
    try:
        array = np.array(values)
    except ValueError:
        raise ValueError(f"{name} must be an array of numbers, got {values!r}") from None
    if array.dtype == object and all(isinstance(one, numbers.Real) and not _is_bool(one) for one in array.flat):
        array = array.astype(np.float64)  # integers beyond 64 bits
    if array.dtype.kind not in "iuf":
        kind = "an empty or mixed list" if array.dtype == object else array.dtype
        raise TypeError(f"{name} must hold real numbers, got {kind}")
    return array


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
