"""LCMScheduler, TCDScheduler and CMStochasticIterativeScheduler: of models that jump to clean data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsample.samplers.consistency import Consistency
from fastsample.samplers.diffusers.alpha_bars import visited
from fastsample.samplers.diffusers.described import OfScheduler, RowsOfScheduler
from fastsample.samplers.diffusers.levels import sigmas_of
from fastsample.samplers.diffusers.reading import Kind, Reading
from fastsample.samplers.lcm import LCM
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.tcd import TCD
from fastsample.schedule import Schedule


@dataclass(frozen=True, kw_only=True, repr=False)
class LCMOfScheduler(OfScheduler, LCM):
    """fastsample.LCM of an LCMScheduler."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TCDOfScheduler(OfScheduler, TCD):
    """fastsample.TCD of a TCDScheduler."""


def _lcm(reading: Reading) -> Sampler:
    t, steps = visited(reading), reading.scheduler.num_inference_steps
    if steps != len(t):
        raise ValueError(
            f"the {reading.name} has {len(t)} of {steps} timesteps left, so that its last step adds noise too: give "
            "timesteps= without those, and no strength="
        )
    return LCMOfScheduler(
        _schedule(reading),
        timesteps=t,
        timestep_scaling=reading.options["timestep_scaling"],
        prediction=reading.prediction("epsilon", "v_prediction", "sample"),
        clip=reading.clip(),
    )


def _tcd(reading: Reading) -> Sampler:
    # It has options to limit x0, which its step does not look at.
    prediction = reading.prediction("epsilon", "v_prediction", "sample")
    return TCDOfScheduler(_schedule(reading), timesteps=visited(reading), gamma=reading.eta, prediction=prediction)


def _schedule(reading: Reading) -> Schedule:
    return Schedule.from_alphas_cumprod(reading.array("alphas_cumprod"))


def _consistency(reading: Reading) -> Sampler:
    options = reading.options
    table = Consistency(
        # Rounding takes the last one below the smallest.
        sigmas=np.maximum(sigmas_of(reading)[:-1], options["sigma_min"]),
        sigma_min=options["sigma_min"],
        sigma_data=options["sigma_data"],
        clip=1.0 if options["clip_denoised"] else None,
    ).table
    drawn = float(reading.scheduler.init_noise_sigma)
    return RowsOfScheduler(table.replace(s=options["s_noise"] * table.s, init_noise_sigma=drawn), reading.t)


_OPTIONS = frozenset(
    (
        *("prediction_type", "timestep_scaling", "clip_sample", "clip_sample_range"),
        *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
    )
)
KINDS = {
    "LCMScheduler": Kind(_lcm, _OPTIONS),
    "TCDScheduler": Kind(_tcd, _OPTIONS, eta=0.3),
    "CMStochasticIterativeScheduler": Kind(_consistency, frozenset({"sigma_data", "s_noise", "clip_denoised"})),
}
