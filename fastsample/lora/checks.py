"""Checks of an adapter's numbers, names and capacity."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence


def finite(name: str, number: object) -> float:
    """The number as a float."""
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise TypeError(f"{name} must be a number, got {number!r}")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number!r}")
    return float(number)


def check_names(names: Sequence[str], known: Mapping[str, object]) -> None:
    """Raises ValueError for a name that no adapter has."""
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter is named {name!r}, there is {', '.join(map(repr, known)) or 'none'}")


def check_weights(weights: Mapping[str, float], known: Mapping[str, object]) -> None:
    """Raises unless weights maps names of adapters to finite numbers."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must map names of adapters to numbers, got {type(weights).__name__}")
    check_names(list(weights), known)
    for name, weight in weights.items():
        finite(f"the weight of {name!r}", weight)


def check_capacity(capacity: int | None) -> None:
    """Raises ValueError unless capacity is a rank or None."""
    if capacity is not None and (not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1):
        raise ValueError(f"capacity must be a rank of at least 1 or None, got {capacity!r}")
