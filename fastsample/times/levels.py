"""The noise levels (alpha, sigma) of a schedule, x_t = alpha*x0 + sigma*z."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastsample.schedule import Float64Array, Schedule


def noise_levels(
    schedule: Schedule, timesteps: NDArray, final_alpha_cumprod: float = 1.0
) -> tuple[Float64Array, Float64Array]:
    """(alpha, sigma), each of shape (N + 1,): x_t = alpha*x0 + sigma*z at the N timesteps and, last, at the end.

    For an alpha bar schedule alpha = sqrt(abar) and sigma = sqrt(1 - abar). Between whole timesteps sigma / alpha is
    interpolated, as in diffusers' Euler. `final_alpha_cumprod` is the alpha bar after the last row: 1 (clean data), or
    `schedule.alphas_cumprod[0]` as Stable Diffusion's scheduler has it.

    Raises:
        ValueError: for a final_alpha_cumprod outside (0, 1] or below the alpha bar of the last timestep, and for
            fractional timesteps on a schedule that reaches alpha bar 0.
    """
    if np.issubdtype(timesteps.dtype, np.integer):
        visited = schedule.alphas_cumprod[timesteps]
    else:
        visited = 1 / (1 + np.interp(timesteps, np.arange(schedule.T), sigma_over_alpha(schedule)) ** 2)
    return levels_through(visited, final_alpha_cumprod, timesteps)


def sigma_over_alpha(schedule: Schedule) -> Float64Array:
    """The ratio at every timestep, shape (T,), which levels between whole timesteps are interpolated from.

    Raises:
        ValueError: where alpha bar is 0 at the last one.
    """
    alpha_bar = schedule.alphas_cumprod
    if alpha_bar[-1] == 0:
        raise ValueError(
            "levels between whole timesteps cannot be had where alpha bar is 0 (zero terminal SNR): use "
            "timesteps='trailing' or whole timesteps"
        )
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def levels_through(visited: Float64Array, final_alpha_cumprod: float, t: NDArray) -> tuple[Float64Array, Float64Array]:
    """(alpha, sigma) at these alpha bars and then at the end."""
    if not max(0.0, visited[-1]) <= final_alpha_cumprod <= 1 or final_alpha_cumprod == 0:
        raise ValueError(
            f"final_alpha_cumprod must lie in (0, 1] and not below {visited[-1]:.6g}, the alpha bar of the last "
            f"timestep {t[-1]}; got {final_alpha_cumprod}"
        )
    alpha_bar = np.append(visited, final_alpha_cumprod)
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
