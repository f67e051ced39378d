"""The default spacing of samplers: evenly down from the noisiest timestep where a model's errors stay small."""

from __future__ import annotations

import numpy as np

from fastsample.schedule import Float64Array, Schedule
from fastsample.times.timesteps import Int64Array, check_steps, check_steps_of_schedule

AUTO = "auto"

# Measured by benchmarks/starts.py: the best starts of a few steps on the cosine and the linear schedule.
MOST_GROWTH = 6.0
# Stable Diffusion's schedule ends at 14.6; models are distilled for few steps from its last timestep.
MOST_RATIO = 16.0


def auto_timesteps(schedule: Schedule, steps: int | None, prediction: str = "epsilon") -> Int64Array:
    """The N timesteps of the spacing "auto": t_k = round((1 - k / N) (t_0 + 1)) - 1 for k = 0 .. N - 1.

    That is "trailing" as if the schedule ended at t_0. A DDIM step from (alpha, sigma) to (alpha', sigma') turns an
    error e of an epsilon model into an error of the state of

        alpha' (sigma / alpha - sigma' / alpha') e

    which has no bound next to pure noise. So t_0 is

    - T - 1 for a v or x0 model, whose error only shrinks, and where sigma / alpha is at most 16 at T - 1, as it is on
      Stable Diffusion's schedule;
    - else the noisiest timestep whose first step makes at most 6 e of an error: on the cosine schedule 959 for 4 steps
      and 995 for 50, on the linear one 937 and T - 1.

    All T steps visit all timesteps. From one t_0 the list of 2 N holds that of N.

    Args:
        steps: N, in [1, T].
        prediction: "epsilon", "v" or "x0".

    Returns:
        int64 array of distinct timesteps in [0, T), strictly descending.

    Raises:
        ValueError, TypeError: for steps outside [1, T] or missing.

    Example:
        >>> auto_timesteps(Schedule.cosine(), 4).tolist()
        [959, 719, 479, 239]
        >>> auto_timesteps(Schedule.cosine(), 4, "v").tolist()
        [999, 749, 499, 249]
    """
    if steps is None:
        raise ValueError(f"timesteps={AUTO!r} needs steps=")
    count = check_steps_of_schedule(check_steps(steps), schedule.T, schedule.T)
    start = np.array([schedule.T - 1])
    last = schedule.alphas_cumprod[-1]
    if prediction == "epsilon" and 1 - last > MOST_RATIO**2 * last:
        candidates = np.arange(count - 1, schedule.T)
        growth = first_growth(schedule, candidates, count)
        allowed = np.flatnonzero(growth <= MOST_GROWTH)
        # Where even the cleanest start is next to pure noise, the one that amplifies least.
        start = candidates[[allowed[-1] if allowed.size else growth.argmin()]]
    return descending(start, count, np.arange(count))


def first_growth(schedule: Schedule, starts: Int64Array, steps: int) -> Float64Array:
    """By how much the first of so many steps from each of these timesteps multiplies an error in epsilon."""
    next_t = descending(starts, steps, 1)
    alpha_bar = schedule.alphas_cumprod[starts]
    next_alpha_bar = np.where(next_t < 0, 1.0, schedule.alphas_cumprod[next_t])  # -1 is the end: clean data
    with np.errstate(divide="ignore"):  # infinite at pure noise
        ratio = np.sqrt((1 - alpha_bar) / alpha_bar)
    growth: Float64Array = np.sqrt(next_alpha_bar) * ratio - np.sqrt(1 - next_alpha_bar)
    return growth


def descending(start: Int64Array, steps: int, k: Int64Array | int) -> Int64Array:
    """Entry k of the N = steps timesteps round((1 - k / N) (t_0 + 1)) - 1 from t_0 = start on; -1 for k = N."""
    # One division of whole numbers: an entry that two lists share is rounded alike in both.
    timesteps: Int64Array = np.round((steps - k) * (start + 1) / steps).astype(np.int64) - 1
    return timesteps
