"""What keeps x0 in range: nothing, a clamp, bounds for each of its elements, or dynamic thresholding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsample.checks import check_number, checked_bounds, real
from fastsample.tables import LEAST

_MOST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Saharia et al. 2022): x0 = clamp(x0, -r, r) / r, r = clamp(Q(|x0|), 1, max), per sample.

    Q is the quantile over a sample, interpolated as torch.quantile does. diffusers' default `sample_max_value` of 1
    makes r = 1 always; the paper has no maximum. Where most values of a sample are at the ends (black and white
    drawings), a `max` of 1 to 1.5 keeps them from turning grey.

    Args:
        quantile: in (0, 1].
        max: the largest r, at least 1.

    Raises:
        ValueError: for values outside these ranges.
    """

    quantile: float = 0.995
    max: float = math.inf

    def __post_init__(self) -> None:
        check_number("quantile", self.quantile)
        check_number("max", self.max)
        if not LEAST < self.quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], and above 0 in float32, got {self.quantile}")
        if not self.max >= 1:
            raise ValueError(f"max must be at least 1, got {self.max}")


Bounds = float | Sequence[Any] | NDArray[Any] | Tensor
Clip = float | DynamicThreshold | tuple[Bounds, Bounds] | None


def limit_columns(clip: Clip) -> dict[str, Any]:
    """The columns `limit` and `quantile` of a table for this clip.

    Raises:
        TypeError: where it is neither a number, a DynamicThreshold, a pair nor None.
        ValueError: for a number not above 0, or which float32 makes 0 or infinite, and for what are no bounds.
    """
    if clip is None:
        return {}
    if isinstance(clip, DynamicThreshold):
        return {"limit": clip.max, "quantile": clip.quantile}
    if isinstance(clip, tuple | list):
        return _box_columns(clip)
    limit = _one_number(clip)
    if not limit > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    if not LEAST < limit <= _MOST and limit != math.inf:
        raise ValueError(f"clip must be positive and finite in float32, got {clip}; None is no clipping")
    return {"limit": limit}


def _one_number(clip: Any) -> float:
    try:
        return real("clip", clip)
    except TypeError:
        got = f"{type(clip).__name__} of shape {tuple(clip.shape)}" if hasattr(clip, "shape") else repr(clip)
        raise TypeError(
            f"clip must be a number, a DynamicThreshold, a pair (low, high), or None for no clipping; got {got}"
        ) from None


def hashable(clip: Clip) -> Clip:
    """The clip without arrays, which samplers are compared and hashed by."""
    if not isinstance(clip, tuple | list):
        return clip
    low, high = checked_bounds("clip", clip)
    return _nested(low.tolist()), _nested(high.tolist())


def _box_columns(clip: Sequence[Any]) -> dict[str, Any]:
    low, high = checked_bounds("clip", clip)
    # Rows with a limit are those that are limited.
    return {"limit": max(float(abs(low).max()), float(abs(high).max()), 1.0), "box": (low, high)}


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value
