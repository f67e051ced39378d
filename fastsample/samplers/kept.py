"""The samplers that functions such as fastsample.ddim made last, for the next call with the same arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from fastsample.checks import real_array
from fastsample.samplers.limits import DynamicThreshold
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Schedule

S = TypeVar("S", bound=Sampler)

_KEPT = 64
_PLAIN = (int, float, str, bool, type(None), DynamicThreshold, np.integer, np.floating)
_samplers: dict[Any, Sampler] = {}
_lock = threading.Lock()


def sampler_of(kind: Callable[..., S], schedule: Schedule | None = None, **fields: Any) -> S:
    """`kind(schedule, **fields)`, kept by the schedule's identity and by the values and types of the fields.

    A sampler whose fields hold functions or tensors is made anew, and so is one that warns, so that every call warns.
    """
    key = _key(kind, schedule, fields)
    kept: Any = None if key is None else _samplers.get(key)
    if kept is not None:
        return kept
    sampler = kind(**fields) if schedule is None else kind(schedule, **fields)
    if key is None or sampler._warns:
        return sampler
    with _lock:
        while len(_samplers) >= _KEPT:
            del _samplers[next(iter(_samplers))]  # the one that was made first
        _samplers[key] = sampler
    return sampler


def _key(kind: Callable[..., Sampler], schedule: Schedule | None, fields: dict[str, Any]) -> Any:
    """The key that tells samplers apart, or None. A kept sampler keeps its schedule, so that no other gets its id."""
    values = []
    for value in fields.values():
        if not isinstance(value, _PLAIN):
            value = _content(value)
            if value is None:
                return None
        values.append(value)
        values.append(type(value))  # 1 equals True and 1.0
    return kind, id(schedule), tuple(values)


def _content(value: Any) -> tuple[object, ...] | None:
    """A hashable copy of timesteps or levels, None for any other value."""
    if isinstance(value, torch.Tensor | np.ndarray):
        try:
            array = real_array("a field", value)
        except (TypeError, ValueError):  # which the sampler itself refuses, by the field's name
            return None
        return array.dtype.str, array.shape, array.tobytes()
    if isinstance(value, list | tuple | range) and all(isinstance(entry, int | float) for entry in value):
        return type(value), *value, *map(type, value)
    return None
