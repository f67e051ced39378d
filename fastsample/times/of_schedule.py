"""The spacings that look at a schedule's noise levels, by name."""

from __future__ import annotations

from fastsample.schedule import Schedule
from fastsample.times.align_your_steps import PUBLISHED, aligned_timesteps
from fastsample.times.automatic import AUTO, auto_timesteps
from fastsample.times.timesteps import Int64Array


def timesteps_of_schedule(schedule: Schedule, spec: object, steps: int | None, prediction: str) -> Int64Array | None:
    """The timesteps of "auto" and of Align Your Steps; None where `spec` is neither of their names.

    Raises:
        ValueError, TypeError: as auto_timesteps and aligned_timesteps.

    Example:
        >>> timesteps_of_schedule(Schedule.cosine(), "auto", 4, "epsilon").tolist()
        [959, 719, 479, 239]
        >>> timesteps_of_schedule(Schedule.cosine(), "trailing", 4, "epsilon")
    """
    if not isinstance(spec, str):
        return None
    if spec == AUTO:
        return auto_timesteps(schedule, steps, prediction)
    return aligned_timesteps(schedule, spec, steps) if spec in PUBLISHED else None
