"""Copies of what a caller has given, for runs that come later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastsample.loop.guidance import Shared, rebuilt
from fastsample.ops.memory import ordinary_tensors


def copied(value: Any) -> Any:
    """The same with copies of its tensors and arrays, which the caller does not see change, nor changes."""
    if isinstance(value, Tensor):
        with ordinary_tensors():
            return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Shared):
        return Shared(copied(value.value))
    if isinstance(value, Mapping):
        return rebuilt(value, {name: copied(one) for name, one in value.items()})
    if isinstance(value, list | tuple):
        copies = [copied(one) for one in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    return value
