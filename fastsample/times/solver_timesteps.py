"""Which timesteps ODE solvers visit: as diffusers' solvers space them, or between whole timesteps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fastsample.hints import hinting
from fastsample.times.timesteps import (
    Spacing,
    SpacingOfSchedule,
    SpacingOfSolvers,
    Timesteps,
    check_steps,
    check_steps_of_schedule,
    descending_times,
    spaced_timesteps,
)

Times = Spacing | SpacingOfSchedule | SpacingOfSolvers | str | Iterable[float]


@hinting()
def solver_timesteps(
    T: int, spec: Timesteps = "linspace", steps: int | None = None, steps_offset: int = 0
) -> NDArray[np.int64]:
    """As `spaced_timesteps`, but "linspace" and "leading" leave out their last timestep, as diffusers' solvers do:

    round(i (T - 1) / N) and i (T // (N + 1)) + steps_offset, i = N .. 1.

    Example:
        >>> solver_timesteps(1000, "linspace", steps=4), solver_timesteps(1000, "leading", steps=4, steps_offset=1)
        (array([999, 749, 500, 250]), array([801, 601, 401, 201]))
    """
    if not isinstance(spec, str) or spec not in ("linspace", "leading"):
        return spaced_timesteps(T, spec, steps)
    count = check_steps_of_schedule(check_steps(steps), T, T - 1)
    if spec == "linspace":
        timesteps = np.linspace(0, T - 1, count + 1).round()[1:].astype(np.int64)
    else:
        timesteps = np.arange(1, count + 1) * (T // (count + 1)) + steps_offset
    return spaced_timesteps(T, timesteps)


def fractional_timesteps(T: int, spec: Times, steps: int) -> NDArray:
    """As `spaced_timesteps`, but "linspace" i (T - 1) / (N - 1) is not rounded, and given times may be fractional.

    Returns:
        Descending, int64, or float64 for "linspace" and where fractional times are given.
    """
    if isinstance(spec, str) and spec == "linspace":
        check_steps(steps)
        return np.linspace(T - 1, 0, steps)
    if isinstance(spec, str):
        return spaced_timesteps(T, spec, steps)
    times = descending_times(spec)
    if (times == np.floor(times)).all():
        return spaced_timesteps(T, times.astype(np.int64))
    if times[0] > T - 1 or times[-1] < 0:
        raise ValueError(f"timesteps must lie in [0, {T - 1}], got {times[-1]} .. {times[0]}")
    return times
