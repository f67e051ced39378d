"""DDIM (Song, Meng & Ermon 2020): the family from deterministic (eta = 0) to ancestral (eta = 1) sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.loop import CorrectX0
from fastsample.loop.options import Options
from fastsample.model import Model, schedule_of
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, check_number, limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.levels import noise_levels
from fastsample.times.predictions import epsilon_coefficients, rederived_epsilon_coefficients, x0_coefficients
from fastsample.times.timesteps import Timesteps, spaced_timesteps


def ddim_table(
    t: np.ndarray,
    alpha: Float64Array,
    sigma: Float64Array,
    *,
    eta: float = 0.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    rederive_epsilon: bool = True,
    corrects_x0: bool = False,
) -> Table:
    """The rows of DDIM from noise level (alpha, sigma) to (alpha', sigma'):

        x' = alpha' x0 + sqrt(sigma'^2 - s^2) epsilon + s z
        s  = eta sqrt(sigma'^2 / sigma^2 (sigma^2 - (alpha / alpha')^2 sigma'^2))

    Args:
        t: times for the model, shape (N,).
        alpha, sigma: noise levels, shape (N + 1,), from the noisiest to the one after the last row.
        eta, prediction, clip, rederive_epsilon: as for `ddim`.
        corrects_x0: x0 may be replaced between the model and the step, so epsilon is re-derived as after clipping.

    Raises:
        ValueError: where eta is negative or so large that s^2 > sigma'^2, for a clip that is not positive, and for a
            prediction that cannot work at one of the levels.
    """
    s, direction = _noise_and_direction(eta, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    rederive = rederive_epsilon and (clip is not None or corrects_x0)
    return direction_table(t, alpha, sigma, direction, s, prediction=prediction, clip=clip, rederive_epsilon=rederive)


def direction_table(
    t: np.ndarray,
    alpha: Float64Array,
    sigma: Float64Array,
    direction: Float64Array,
    s: Float64Array | float,
    *,
    prediction: str,
    clip: Clip,
    rederive_epsilon: bool,
) -> Table:
    """The rows x' = alpha' x0 + direction epsilon + s z, with epsilon from the limited x0 or the model's own.

    `direction` and `s` have shape (N,), `alpha` and `sigma` (N + 1,).
    """
    p, q = x0_coefficients(prediction, alpha[:-1], sigma[:-1])
    if rederive_epsilon:
        of_x, of_x0 = rederived_epsilon_coefficients(alpha[:-1], sigma[:-1])
        own: dict[str, Any] = {"a": direction * of_x, "b": alpha[1:] + direction * of_x0}
    else:
        of_x, of_m = epsilon_coefficients(prediction, alpha[:-1], sigma[:-1])
        own = {"a": direction * of_x, "b": alpha[1:], "d": direction * of_m}
    return Table(t, p=p, q=q, s=s, **own, **limit_columns(clip), alpha=alpha, sigma=sigma)


def _noise_and_direction(
    eta: float, alpha: Float64Array, sigma: Float64Array, next_alpha: Float64Array, next_sigma: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """(s, sqrt(sigma'^2 - s^2)). With alpha^2 + sigma^2 = 1, s is the paper's eta sigma'/sigma sqrt(1 - abar/abar')."""
    check_number("eta", eta)
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be at least 0 and finite, got {eta}")
    # Rounding alone can take these two below 0, at a last level that repeats and at eta = 1.
    added = sigma**2 - (alpha / next_alpha * next_sigma) ** 2
    variance = np.maximum((next_sigma / np.where(sigma > 0, sigma, 1.0)) ** 2 * added, 0.0)
    room = next_sigma**2 - eta**2 * variance
    if (room < -1e-12 * next_sigma**2).any():
        adds = variance > 0
        largest = np.sqrt((next_sigma[adds] ** 2 / variance[adds]).min())
        largest = math.floor(largest * 1e6) / 1e6  # rounded up it would be refused itself
        raise ValueError(f"eta={eta} needs more noise than there is room for; the largest valid eta here is {largest}")
    return eta * np.sqrt(variance), np.sqrt(np.maximum(room, 0.0))


@dataclass(frozen=True)
class DDIM(Sampler):
    """A DDIM sampler: the arguments of `ddim` that shape the table. Immutable and reusable, from several threads too.

    Example:
        >>> sampler = DDIM(Schedule.linear(), steps=10)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> for step in sampler.iterate(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1):
        ...     last = step.t
        >>> last
        0
    """

    schedule: Schedule
    steps: int = field(default=50, kw_only=True)
    timesteps: Timesteps = field(default="leading", kw_only=True)
    eta: float = field(default=0.0, kw_only=True)
    prediction: str = field(default="epsilon", kw_only=True)
    clip: Clip = field(default=None, kw_only=True)
    rederive_epsilon: bool = field(default=True, kw_only=True)
    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)
    final_alpha_cumprod: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        t = self._spaced(spaced_timesteps)
        check_number("final_alpha_cumprod", self.final_alpha_cumprod)
        alpha, sigma = noise_levels(self.schedule, t, self.final_alpha_cumprod)
        self._set(
            table=ddim_table(
                t,
                alpha,
                sigma,
                eta=self.eta,
                prediction=self.prediction,
                clip=self.clip,
                rederive_epsilon=self.rederive_epsilon,
                corrects_x0=self.correct_x0 is not None,
            )
        )


def ddim(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 50,
    eta: float = 0.0,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "leading",
    prediction: str = "epsilon",
    clip: Clip = None,
    rederive_epsilon: bool = True,
    correct_x0: CorrectX0 | None = None,
    final_alpha_cumprod: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """Samples from a diffusion model with DDIM (Song, Meng & Ermon 2020).

    From timestep t to the next entry of the list, t' (not t - T // N), with alpha bars a and a':

        x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)
        s  = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')
        x' = sqrt(a') x0 + sqrt(1 - a' - s^2) epsilon + s z

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (more sample than noise) is warned of.
        steps: model calls, where `timesteps` names a spacing; otherwise ignored. A single step is from timestep T - 1
            under every name (a sampler's own rule: spaced_timesteps gives the peers' lists).
        eta: 0 is deterministic, 1 is ancestral sampling; larger values as far as 1 - a' >= s^2.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
        timesteps: which timesteps to visit, see fastsample.spaced_timesteps. Stable Diffusion's own are
            spaced_timesteps(1000, steps=steps, steps_offset=1), with final_alpha_cumprod as below.
        prediction: what the model predicts: "epsilon", "v" (sqrt(a) epsilon - sqrt(1 - a) x0) or "x0".
        clip: clamp x0 to [-clip, clip]; a fastsample.DynamicThreshold; None for neither. Needed where the
            first timestep is next to pure noise (a cosine schedule's last) and nothing else limits x0. To clip as
            diffusers does, set rederive_epsilon=False too.
        rederive_epsilon: after clipping or correction, take epsilon from the new x0 (improved-diffusion; diffusers'
            use_clipped_model_output). False keeps the model's own (diffusers' default).
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` as in Stable Diffusion.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, decode, out, backend, device.

    Calls with the same arguments share a fastsample.DDIM, whose table takes some 0.3 ms to make: make a schedule once,
    not in every call, for two are told apart by identity. See `DDIM.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the differentiable
        reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> ddim(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
    """
    sampler = sampler_of(
        DDIM,
        schedule_of(model, schedule),
        steps=steps,
        timesteps=timesteps,
        eta=eta,
        prediction=prediction,
        clip=clip,
        rederive_epsilon=rederive_epsilon,
        correct_x0=correct_x0,
        final_alpha_cumprod=final_alpha_cumprod,
    )
    return sampler(model, x, **options)
