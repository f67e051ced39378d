"""The noise levels of flow matching, x_t = (1 - sigma)*x0 + sigma*z."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from fastsample.checks import real
from fastsample.hints import meant_value
from fastsample.schedule import Float64Array
from fastsample.times.timesteps import check_steps, descending_times

FlowSpacing = Literal["linspace", "trailing"]


def flow_levels(
    timesteps: FlowSpacing | str | Iterable[float], steps: int, shift: float = 1.0
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """(t, alpha, sigma) of flow matching: alpha = 1 - sigma, and the model is given t = 1000 sigma; the end is sigma 0.

    Args:
        timesteps: with f(s) = shift s / (1 + (shift - 1) s), N = steps and i = 0 .. N - 1,
            - "linspace": f(1 + i / (N - 1) (f(1/1000) - 1)), diffusers' FlowMatchEulerDiscreteScheduler (that f is
              applied twice at the far end is its convention);
            - "trailing": f(1 - i / N), the sigmas that diffusers' Flux pipelines pass, whose mu is log(shift);
            - the times themselves, 1000 sigma, in any order and taken as they are.

    Raises:
        ValueError: for fewer than one step, a shift that is not positive, another name, times outside (0, 1000] or that
            repeat. TypeError: for what is no list of numbers.

    Example:
        >>> flow_levels("trailing", 4, shift=3.0)[0].tolist()
        [1000.0, 900.0, 750.0, 500.0]
    """
    if not isinstance(timesteps, str):
        times = descending_times(timesteps)
        if times[0] <= 1:
            raise ValueError(f"times of a flow are 1000 sigma, got {times[-1]} .. {times[0]}")
        if times[0] > 1000 or times[-1] <= 0:
            raise ValueError(f"times of a flow must lie in (0, 1000], got {times[-1]} .. {times[0]}")
        sigma = times / 1000
    else:
        check_steps(steps)
        shift = real("shift", shift)
        if not 0 < shift < np.inf:
            raise ValueError(f"shift must be positive and finite, got {shift}")
        if timesteps not in get_args(FlowSpacing):
            meant = meant_value("timesteps", timesteps, get_args(FlowSpacing))
            raise ValueError(f"timesteps of a flow must be linspace, trailing or the times, got {timesteps!r}{meant}")
        last = shift / (1000 + shift - 1) if timesteps == "linspace" else 1 / steps
        sigma = np.linspace(1.0, last, steps)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    levels = np.append(sigma, 0.0)
    return 1000 * sigma, 1 - levels, levels
