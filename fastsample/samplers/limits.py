"""What keeps x0 in range: nothing, a clamp, or dynamic thresholding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastsample.checks import check_number


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
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {self.quantile}")
        if not self.max >= 1:
            raise ValueError(f"max must be at least 1, got {self.max}")


Clip = float | DynamicThreshold | None


def limit_columns(clip: Clip) -> dict[str, Any]:
    """The columns `limit` and `quantile` of a table for this clip.

    Raises:
        TypeError: where it is neither a number, a DynamicThreshold nor None. ValueError: for a number not above 0.
    """
    if clip is None:
        return {}
    if isinstance(clip, DynamicThreshold):
        return {"limit": clip.max, "quantile": clip.quantile}
    if isinstance(clip, bool):
        raise TypeError(f"clip must be a number, a DynamicThreshold, or None for no clipping; got {clip}")
    check_number("clip", clip)
    if not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    return {"limit": clip}
