"""The published timesteps of Align Your Steps (Sabour et al. 2024), at the same noise levels of any schedule."""

from __future__ import annotations

import numpy as np

from fastsample.schedule import Schedule
from fastsample.times.levels import sigma_over_alpha
from fastsample.times.timesteps import Int64Array, apart, check_steps, check_steps_of_schedule

# Of ten steps on Stable Diffusion's schedule, found by the authors; diffusers' AysSchedules holds the same.
PUBLISHED = {
    "ays_sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


def aligned_timesteps(schedule: Schedule, name: str, steps: int | None = None) -> Int64Array:
    """The timesteps of `schedule` whose sigma / alpha is nearest to that of the published ones, in its logarithm.

    The published ten, and the first timestep as the level after them, are interpolated in log(sigma / alpha) for other
    numbers of steps, as the authors do.

    Args:
        name: "ays_sd15" or "ays_sdxl", the model that they were found for.
        steps: N; the published 10 where not given.

    Returns:
        int64 array of N distinct timesteps, strictly descending. Where two would meet, the cleaner one moves on.

    Raises:
        ValueError, TypeError: for steps below 1 or beyond the schedule's timesteps.

    Example:
        >>> aligned_timesteps(Schedule.scaled_linear(), "ays_sd15").tolist()
        [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
        >>> aligned_timesteps(Schedule.cosine(), "ays_sdxl", 5).tolist()
        [955, 833, 588, 316, 138]
    """
    count = check_steps_of_schedule(check_steps(10 if steps is None else steps), schedule.T, schedule.T)
    published = np.array([*PUBLISHED[name], 0])
    logs = np.log(sigma_over_alpha(Schedule.scaled_linear())[published])
    wanted = np.interp(np.linspace(0, 1, count + 1)[:-1], np.linspace(0, 1, len(logs)), logs)
    alpha_bar = schedule.alphas_cumprod
    with np.errstate(divide="ignore"):  # at timesteps of pure noise and of none
        own = (np.log1p(-alpha_bar) - np.log(alpha_bar)) / 2
    return apart(np.abs(own[None] - wanted[:, None]).argmin(axis=1), schedule.T)
