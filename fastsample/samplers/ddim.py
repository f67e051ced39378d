"""DDIM (Song, Meng & Ermon 2020): the family from deterministic (eta = 0) to ancestral (eta = 1) sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import check_number
from fastsample.loop.options import CorrectX0
from fastsample.samplers.columns import direction_table
from fastsample.samplers.limits import Clip
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.spaced import Spaced
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.predictions import Prediction


@dataclass(frozen=True, kw_only=True)
class DDIM(Spaced):
    """Samples from a diffusion model with DDIM (Song, Meng & Ermon 2020).

    From timestep t to the next entry of the list, t' (not t - T // N), with alpha bars a and a':

        x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)
        s  = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')
        x' = sqrt(a') x0 + sqrt(1 - a' - s^2) epsilon + s z

    Args:
        timesteps: ... Stable Diffusion's own are spaced_timesteps(1000, steps=steps, steps_offset=1), with
            final_alpha_cumprod=schedule.alphas_cumprod[0].
        eta: 0 is deterministic, 1 is ancestral sampling; larger values as far as 1 - a' >= s^2.
        clip: ... Needed where a list's first timestep is next to pure noise (a cosine schedule's last) and nothing else
            limits x0; the default's is not. To clip as diffusers does, set rederive_epsilon=False too.
        rederive_epsilon: after clipping or correction, take epsilon from the new x0 (improved-diffusion; diffusers'
            use_clipped_model_output). False keeps the model's own (diffusers' default).

    Raises:
        ValueError: where eta is negative or so large that s^2 > 1 - a', for a clip that is not positive, and for a
            prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule
        >>> ddim(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = DDIM(Schedule.linear(), steps=10)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> for step in sampler.iterate(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1):
        ...     last = step.t
        >>> last
        99
    """

    steps: int = 50
    eta: float = 0.0
    prediction: Prediction = "epsilon"
    clip: Clip = None
    rederive_epsilon: bool = True
    correct_x0: CorrectX0 | None = None
    final_alpha_cumprod: float = 1.0

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        s, direction = noise_and_direction(self.eta, alpha, sigma)
        limited = self.clip is not None or self.correct_x0 is not None
        return direction_table(
            t,
            alpha,
            sigma,
            direction,
            s,
            prediction=self.prediction,
            clip=self.clip,
            rederive_epsilon=self.rederive_epsilon and limited,
        )


def noise_and_direction(eta: float, alpha: Float64Array, sigma: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(s, sqrt(sigma'^2 - s^2)) of DDIM from each noise level (alpha, sigma) to the next one (alpha', sigma'):

        s = eta sqrt(sigma'^2 / sigma^2 (sigma^2 - (alpha / alpha')^2 sigma'^2))

    With alpha^2 + sigma^2 = 1, s is the paper's eta sigma'/sigma sqrt(1 - abar/abar').

    Raises:
        TypeError: for an eta that is no number. ValueError: where it is negative, or so large that s^2 > sigma'^2.
    """
    check_number("eta", eta)
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be at least 0 and finite, got {eta}")
    alpha, next_alpha, sigma, next_sigma = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    # Rounding alone can take these two below 0, at a last level that repeats and at eta = 1.
    with np.errstate(divide="ignore"):  # by an alpha' of 0, where nothing is added
        added = sigma**2 - (alpha / next_alpha * next_sigma) ** 2
    variance = np.maximum((next_sigma / np.where(sigma > 0, sigma, 1.0)) ** 2 * added, 0.0)
    room = next_sigma**2 - eta**2 * variance
    if (room < -1e-12 * next_sigma**2).any():
        adds = variance > 0
        largest = np.sqrt((next_sigma[adds] ** 2 / variance[adds]).min())
        largest = math.floor(largest * 1e6) / 1e6  # rounded up it would be refused itself
        raise ValueError(f"eta={eta} needs more noise than there is room for; the largest valid eta here is {largest}")
    return eta * np.sqrt(variance), np.sqrt(np.maximum(room, 0.0))


ddim = sampling_function(DDIM, "ddim")
