"""The timesteps of students: nested, so that a student's few are among the many of its teacher."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsample.times.automatic import descending


def nested_timesteps(start: int, steps: int) -> tuple[int, ...]:
    """round((1 - k / N) (start + 1)) - 1 for k = 0 .. N - 1: those of N steps are among those of any multiple of N.

    Raises:
        ValueError: there are not so many timesteps from start on.

    Example:
        >>> nested_timesteps(999, 4), nested_timesteps(999, 2)
        ((999, 749, 499, 249), (999, 499))
    """
    if not 1 <= steps <= start + 1:
        raise ValueError(f"steps must lie in [1, {start + 1}] from timestep {start} on, got {steps}")
    return tuple(descending(np.array([start]), steps, np.arange(steps)).tolist())


def nearest(levels: Tensor, values: Tensor) -> Tensor:
    """The place of the level nearest to each value, int64; levels ascend, two of them at least."""
    above = torch.searchsorted(levels, values.contiguous()).clamp(1, len(levels) - 1)
    return above - (values - levels[above - 1] < levels[above] - values).long()
