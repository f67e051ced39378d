"""Noise levels spaced evenly in a function of sigma / alpha, with the times that lie between whole timesteps."""

from __future__ import annotations

import numpy as np

from fastsample.checks import real
from fastsample.schedule import Float64Array, Schedule
from fastsample.times.levels import levels_through, sigma_over_alpha
from fastsample.times.timesteps import check_steps


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> Float64Array:
    """sigma^(1/rho) evenly spaced from sigma_max to sigma_min, shape (steps,) (Karras et al. 2022, equation 5).

    Raises:
        ValueError: unless 0 <= sigma_min <= sigma_max < inf, steps >= 1 and 0 < rho < inf. TypeError: for what is no
            number.

    Example:
        >>> karras_sigmas(80.0, 0.002, 3).round(4).tolist()
        [80.0, 2.5152, 0.002]
    """
    largest, smallest, rho = real("sigma_max", sigma_max), real("sigma_min", sigma_min), real("rho", rho)
    if not 0 < largest < np.inf:
        raise ValueError(f"sigma_max must be positive and finite, got {largest}")
    if not 0 <= smallest <= largest:
        raise ValueError(f"sigma_min must lie in [0, sigma_max = {largest}], got {smallest}")
    if not 0 < rho < np.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    return np.linspace(largest ** (1 / rho), smallest ** (1 / rho), check_steps(steps)) ** rho


def spaced_levels(
    schedule: Schedule, spacing: str, steps: int, final_alpha_cumprod: float = 1.0
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """(t, alpha, sigma): N levels from that of timestep T - 1 to that of timestep 0, and the end.

    With r = sigma / alpha, "karras" spaces r^(1/7) evenly (Karras et al. 2022), "log_snr" log r (Lu et al. 2022). t, of
    shape (N,), is interpolated in log r between whole timesteps, as in diffusers.

    Raises:
        ValueError: for fewer than one step, another spacing, and a schedule that reaches alpha bar 0 or 1; otherwise as
            `noise_levels`.

    Example:
        >>> t, alpha, sigma = spaced_levels(Schedule.linear(), "karras", 4)
        >>> t.round(1).tolist()
        [999.0, 775.1, 301.0, 0.0]
    """
    check_steps(steps)
    ratio = sigma_over_alpha(schedule)
    if ratio[0] == 0:
        raise ValueError(f"timesteps={spacing!r} cannot work where alpha bar is 1: timestep 0 has no noise")
    if spacing == "karras":
        ratios = karras_sigmas(ratio[-1], ratio[0], steps)
    elif spacing == "log_snr":
        ratios = np.geomspace(ratio[-1], ratio[0], steps)
    else:
        raise ValueError(f"spacing must be karras or log_snr, got {spacing!r}")
    t = np.interp(np.log(ratios), np.log(ratio), np.arange(schedule.T))
    # Rounding must not take the last level past that of timestep 0, which may also be the end.
    return t, *levels_through(np.minimum(1 / (1 + ratios**2), schedule.alphas_cumprod[0]), final_alpha_cumprod, t)
