"""DDIMScheduler and DDPMScheduler: from one alpha bar of the schedule to another, which need not be the next step's."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.ddim import noise_and_direction
from fastsample.samplers.diffusers.described import RowsOfScheduler
from fastsample.samplers.diffusers.reading import PREDICTIONS, Kind, Reading
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.predictions import epsilon_coefficients, rederived_epsilon_coefficients, x0_coefficients

_Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
_SMALLEST = 1e-20  # what DDPMScheduler clamps a variance to
# What schedulers of sigmas have in place of an alpha bar of 0, which a model of the noise cannot tell x0 from.
_NEARLY_0 = 2.0**-24


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
    if reading.corrects and reading.options["prediction_type"] == "epsilon":
        known = np.where(known == 0, _NEARLY_0, known)
    return np.where(t >= 0, known[np.maximum(t, 0)], final)


def visited(reading: Reading) -> NDArray[Any]:
    """The timesteps, which must all be in the schedule."""
    if (reading.t < 0).any():
        raise ValueError(f"the {reading.name} has timestep {reading.t.min()}: it lies outside the schedule")
    return reading.t


def ddim_columns(
    reading: Reading, t: NDArray[Any], now: Float64Array, then: Float64Array, *, rederive_epsilon: bool = False
) -> dict[str, Any]:
    """A table's columns of DDIM's rows at timesteps t, from alpha bars `now` to `then`, with the reading's eta."""
    # The levels of a row are a pair, since it does not always lead to the level of the next one.
    alphas, sigmas = np.sqrt([now, then]), np.sqrt([1 - now, 1 - then])
    ((s,), (direction,)) = noise_and_direction(reading.eta, alphas, sigmas)
    alpha, next_alpha, sigma = *alphas, sigmas[0]
    prediction = reading.prediction("epsilon", "v_prediction", "sample")
    p, q = x0_coefficients(prediction, alpha, sigma)
    if rederive_epsilon:
        of_x, of_x0 = rederived_epsilon_coefficients(alpha, sigma)
        columns = {"a": direction * of_x, "b": next_alpha + direction * of_x0}
    else:
        of_x, of_m = epsilon_coefficients(prediction, alpha, sigma)
        columns = {"a": direction * of_x, "b": next_alpha, "d": direction * of_m}
    return {"t": t, "p": p, "q": q, **columns, "s": s, **reading.limits()}


def ddpm_columns(reading: Reading, t: NDArray[Any], now: NDArray[Any], then: NDArray[Any]) -> dict[str, Any]:
    """A table's columns of DDPM's rows at timesteps t, from alpha bars `now` to `then`."""
    p, q = x0_coefficients(reading.prediction("epsilon", "v_prediction", "sample"), np.sqrt(now), np.sqrt(1 - now))
    beta = 1 - now / then
    beta_tilde = np.maximum((1 - then) / (1 - now) * beta, _SMALLEST)
    return {
        "t": t,
        "p": p,
        "q": q,
        "a": np.sqrt(now / then) * (1 - then) / (1 - now),
        "b": np.sqrt(then) * beta / (1 - now),
        "s": (t > 0).astype(np.float64),
        **_half_log_variance(reading, np.log(beta), np.log(beta_tilde)),
        **reading.limits(),
    }


def following(reading: Reading, t: NDArray[Any]) -> NDArray[Any]:
    """The timesteps that DDIM's steps from t lead to; negative after the last."""
    if reading.corrects:
        return np.append(t[1:], -1)
    return t - reading.T // reading.scheduler.num_inference_steps


def _ddim(reading: Reading) -> Sampler:
    """The rows of fastsample.DDIM, but that diffusers' own scheduler leads to timestep t - T // N."""
    t = visited(reading)
    final = float(reading.scheduler.final_alpha_cumprod)
    now = alpha_bars(reading, t, final)
    then = alpha_bars(reading, following(reading, t), final)
    return _of_rows(reading, ddim_columns(reading, t, now, then), now, then)


def _ddpm(reading: Reading) -> Sampler:
    """The rows of fastsample.DDPM, but that the last one adds noise where its timestep is not 0."""
    t = visited(reading)
    scheduler = reading.scheduler
    listed = scheduler.num_inference_steps is not None or scheduler.custom_timesteps
    now = alpha_bars(reading, t, 1.0)
    then = alpha_bars(reading, np.append(t[1:], -1) if listed else t - 1, 1.0)
    if (now == 1).any():
        raise ValueError(f"the {reading.name} cannot pass timestep {t[now == 1][0]}, where alpha bar is 1")
    return _of_rows(reading, ddpm_columns(reading, t, now, then), now, then)


def _of_rows(reading: Reading, columns: dict[str, Any], now: Float64Array, then: Float64Array) -> Sampler:
    levels = np.append(now, then[-1])
    table = Table(**columns, alpha=np.sqrt(levels), sigma=np.sqrt(1 - levels))
    return RowsOfScheduler(table, reading.t, reading.prediction(*PREDICTIONS))


def _half_log_variance(reading: Reading, largest: NDArray[Any], smallest: NDArray[Any]) -> dict[str, NDArray[Any]]:
    variance = reading.options["variance_type"]
    if variance in ("fixed_small", "fixed_small_log"):
        return {"g0": smallest / 2}
    if variance == "fixed_large" or (variance == "fixed_large_log" and reading.corrects):
        return {"g0": largest / 2}
    if variance == "learned_range":
        return {"g0": (largest + smallest) / 4, "g1": (largest - smallest) / 4}
    if variance == "learned" and reading.corrects:
        return {"g1": np.full_like(largest, 0.5)}
    if variance not in get_args(_Variance) and reading.corrects:  # as diffusers' step takes it
        return {"g0": smallest / 2}
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
