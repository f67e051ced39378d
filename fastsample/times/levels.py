"""Noise levels (alpha, sigma), x_t = alpha*x0 + sigma*z, and what a prediction tells at each of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import integer, real, real_array
from fastsample.schedule import Float64Array, Schedule

PREDICTIONS = ("epsilon", "v", "x0", "flow")


def noise_levels(
    schedule: Schedule, timesteps: NDArray, final_alpha_cumprod: float = 1.0
) -> tuple[Float64Array, Float64Array]:
    """(alpha, sigma), each of shape (N + 1,): x_t = alpha*x0 + sigma*z at the N timesteps and, last, at the end.

    For an alpha bar schedule alpha = sqrt(abar) and sigma = sqrt(1 - abar). Between whole timesteps sigma / alpha is
    interpolated, as in diffusers' Euler. `final_alpha_cumprod` is the alpha bar after the last row: 1 (clean data), or
    `schedule.alphas_cumprod[0]` as Stable Diffusion's scheduler has it.

    Raises:
        ValueError: where it is outside (0, 1] or lies below the alpha bar of the last timestep, and for fractional
            timesteps on a schedule that reaches alpha bar 0.
    """
    if np.issubdtype(timesteps.dtype, np.integer):
        visited = schedule.alphas_cumprod[timesteps]
    else:
        visited = 1 / (1 + np.interp(timesteps, np.arange(schedule.T), _sigma_over_alpha(schedule)) ** 2)
    return _through(visited, final_alpha_cumprod, timesteps)


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
    ratio = _sigma_over_alpha(schedule)
    if ratio[0] == 0:
        raise ValueError(f"timesteps={spacing!r} cannot work where alpha bar is 1: timestep 0 has no noise")
    if spacing == "karras":
        chosen = karras_sigmas(ratio[-1], ratio[0], steps)
    elif spacing == "log_snr":
        chosen = np.geomspace(ratio[-1], ratio[0], steps)
    else:
        raise ValueError(f"spacing must be karras or log_snr, got {spacing!r}")
    t = np.interp(np.log(chosen), np.log(ratio), np.arange(schedule.T))
    # Rounding must not take the last level past that of timestep 0, which may also be the end.
    return t, *_through(np.minimum(1 / (1 + chosen**2), schedule.alphas_cumprod[0]), final_alpha_cumprod, t)


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


def flow_levels(
    timesteps: str | Iterable[float], steps: int, shift: float = 1.0
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
        if timesteps not in ("linspace", "trailing"):
            raise ValueError(f"timesteps of a flow must be linspace, trailing or the times, got {timesteps!r}")
        last = shift / (1000 + shift - 1) if timesteps == "linspace" else 1 / steps
        sigma = np.linspace(1.0, last, steps)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    levels = np.append(sigma, 0.0)
    return 1000 * sigma, 1 - levels, levels


def descending_times(times: Iterable[float]) -> Float64Array:
    """The times as float64, descending.

    Raises:
        TypeError: for what is no list of numbers. ValueError: where they are none, not finite, or repeat.
    """
    try:
        values = real_array("timesteps", times if hasattr(times, "__array__") else list(times)).astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"timesteps must be a spacing's name or the times themselves, got {times!r}") from None
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"timesteps must be a non-empty list of finite numbers, got {times!r}")
    values = np.sort(values)[::-1]
    if (repeated := np.diff(values) == 0).any():
        raise ValueError(f"timestep {values[int(repeated.argmax())]} occurs twice")
    return values


def check_steps(steps: int | None) -> int:
    """The same number. Raises TypeError for what is no int, ValueError for less than one."""
    return integer("steps", steps, 1)


def _sigma_over_alpha(schedule: Schedule) -> Float64Array:
    alpha_bar = schedule.alphas_cumprod
    if alpha_bar[-1] == 0:
        raise ValueError(
            "levels between whole timesteps cannot be had where alpha bar is 0 (zero terminal SNR): use "
            "timesteps='trailing' or whole timesteps"
        )
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def _through(visited: Float64Array, final_alpha_cumprod: float, t: NDArray) -> tuple[Float64Array, Float64Array]:
    """(alpha, sigma) at these alpha bars and then at the end."""
    if not max(0.0, visited[-1]) <= final_alpha_cumprod <= 1 or final_alpha_cumprod == 0:
        raise ValueError(
            f"final_alpha_cumprod must lie in (0, 1] and not below {visited[-1]:.6g}, the alpha bar of the last "
            f"timestep {t[-1]}; got {final_alpha_cumprod}"
        )
    alpha_bar = np.append(visited, final_alpha_cumprod)
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def x0_coefficients(prediction: str, alpha: Float64Array, sigma: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(p, q) with x0 = p*x + q*m for a model that predicts

    - epsilon: the noise z;
    - v: alpha z - sigma x0, where alpha^2 + sigma^2 = 1 (Salimans & Ho 2022);
    - x0: the clean sample;
    - flow: the velocity z - x0, where alpha + sigma = 1 (flow matching).

    Raises:
        ValueError: for another prediction, and for epsilon where alpha is 0: x0 cannot be told from pure noise.
    """
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise ValueError(
                "prediction='epsilon' cannot work where alpha bar is 0 (zero terminal SNR): leave that timestep out or "
                "use a model that predicts v or x0"
            )
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        if not np.allclose(alpha**2 + sigma**2, 1):
            raise ValueError("prediction='v' needs levels with alpha^2 + sigma^2 = 1, as alpha bars give them")
        return alpha, -sigma
    if prediction == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "flow":
        if not np.allclose(alpha + sigma, 1):
            raise ValueError("prediction='flow' needs levels with alpha + sigma = 1: use fastsample.euler")
        return np.ones_like(alpha), -sigma
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def epsilon_coefficients(
    prediction: str, alpha: Float64Array, sigma: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """(r, u) with epsilon = r*x + u*m, the direction that the model's own output implies, before x0 is limited.

    Raises:
        ValueError: for x0 prediction where sigma is 0: clean data do not tell the noise.
    """
    if prediction == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v":
        return sigma, alpha
    if prediction == "flow":
        return np.ones_like(alpha), alpha
    return rederived_epsilon_coefficients(alpha, sigma)


def rederived_epsilon_coefficients(alpha: Float64Array, sigma: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(r, w) with epsilon = r*x + w*x0, the direction that a limited or corrected x0 implies.

    Raises:
        ValueError: where sigma is 0.
    """
    if (sigma == 0).any():
        raise ValueError("epsilon cannot be derived from x0 where alpha bar is 1: leave that timestep out")
    return 1 / sigma, -alpha / sigma
