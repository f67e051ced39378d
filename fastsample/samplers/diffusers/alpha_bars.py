"""DDIMScheduler and DDPMScheduler: from one alpha bar of the schedule to another, which need not be the next step's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.columns import x0_table
from fastsample.samplers.ddim import noise_and_direction
from fastsample.samplers.diffusers.reading import Kind, Reading
from fastsample.samplers.limits import limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.predictions import epsilon_coefficients, x0_coefficients

_SMALLEST = 1e-20  # what DDPMScheduler clamps a variance to


def alpha_bars(reading: Reading, t: NDArray[Any], final: float) -> Float64Array:
    """Those of the schedule at timesteps t, and `final` where t is negative.

    Raises:
        ValueError: for timesteps beyond the schedule.
    """
    known = reading.array("alphas_cumprod")
    if t.max() >= len(known):
        raise ValueError(
            f"timestep {t.max()} of this {reading.name} lies outside [0, {len(known)}): its steps_offset or "
            "num_train_timesteps is too large"
        )
    return np.where(t >= 0, known[np.maximum(t, 0)], final)


def visited(reading: Reading) -> NDArray[Any]:
    """The timesteps, which must all be in the schedule."""
    if (reading.t < 0).any():
        raise ValueError(f"the {reading.name} has timestep {reading.t.min()}: it lies outside the schedule")
    return reading.t


def _ddim(reading: Reading) -> Sampler:
    """The rows of fastsample.DDIM, but that they lead to timestep t - T // N, as the scheduler's do."""
    t = visited(reading)
    final = float(reading.scheduler.final_alpha_cumprod)
    abar = alpha_bars(reading, t, final)
    then = alpha_bars(reading, t - reading.T // reading.scheduler.num_inference_steps, final)
    # The levels of a row are a pair, since it does not always lead to the level of the next one.
    (alpha, next_alpha), (sigma, next_sigma) = pairs = np.sqrt([abar, then]), np.sqrt([1 - abar, 1 - then])
    ((s,), (direction,)) = noise_and_direction(reading.eta, *pairs)
    prediction = reading.prediction("epsilon", "v_prediction", "sample")
    p, q = x0_coefficients(prediction, alpha, sigma)
    of_x, of_m = epsilon_coefficients(prediction, alpha, sigma)
    return Sampler(
        Table(
            t,
            p=p,
            q=q,
            a=direction * of_x,
            b=next_alpha,
            d=direction * of_m,
            s=s,
            **limit_columns(reading.clip()),
            alpha=np.append(alpha, next_alpha[-1]),
            sigma=np.append(sigma, next_sigma[-1]),
        )
    )


def _ddpm(reading: Reading) -> Sampler:
    """The rows of fastsample.DDPM, but that the last one adds noise where its timestep is not 0."""
    t = visited(reading)
    scheduler = reading.scheduler
    listed = scheduler.num_inference_steps is not None or scheduler.custom_timesteps
    now = alpha_bars(reading, t, 1.0)
    then = alpha_bars(reading, np.append(t[1:], -1) if listed else t - 1, 1.0)
    if (now == 1).any():
        raise ValueError(f"the {reading.name} cannot pass timestep {t[now == 1][0]}, where alpha bar is 1")
    beta = 1 - now / then
    beta_tilde = np.maximum((1 - then) / (1 - now) * beta, _SMALLEST)
    return Sampler(
        x0_table(
            t,
            np.sqrt(np.append(now, then[-1])),
            np.sqrt(1 - np.append(now, then[-1])),
            prediction=reading.prediction("epsilon", "v_prediction", "sample"),
            clip=reading.clip(),
            a=np.sqrt(now / then) * (1 - then) / (1 - now),
            b=np.sqrt(then) * beta / (1 - now),
            s=(t > 0).astype(np.float64),
            **_half_log_variance(reading, np.log(beta), np.log(beta_tilde)),
        )
    )


def _half_log_variance(reading: Reading, largest: Float64Array, smallest: Float64Array) -> dict[str, Float64Array]:
    variance = reading.options["variance_type"]
    if variance in ("fixed_small", "fixed_small_log"):
        return {"g0": smallest / 2}
    if variance == "fixed_large":
        return {"g0": largest / 2}
    if variance == "learned_range":
        return {"g0": (largest + smallest) / 4, "g1": (largest - smallest) / 4}
    why = {
        "fixed_large_log": "it takes the square root of a negative number; 'fixed_large' is what it means",
        "learned": "it takes the square root of what the model returns; fastsample.ddpm(variance='learned') takes that "
        "for the log variance, as improved-diffusion does",
    }
    raise reading.refused("variance_type", why.get(variance, "its step knows no such variance"))


_LIMITS = frozenset(
    (
        *("prediction_type", "clip_sample", "clip_sample_range"),
        *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
    )
)
KINDS = {
    "DDIMScheduler": Kind(_ddim, _LIMITS, eta=0.0),
    "DDIMParallelScheduler": Kind(_ddim, _LIMITS, eta=0.0),
    "DDPMScheduler": Kind(_ddpm, _LIMITS | {"variance_type"}),
    "DDPMParallelScheduler": Kind(_ddpm, _LIMITS | {"variance_type"}),
}
