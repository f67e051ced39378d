"""Inversion: the deterministic way from a clean sample to the noise that DDIM, or Euler's method, makes it from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.options import Options
from fastsample.model import Model, schedule_of
from fastsample.samplers.ddim import direction_table
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, check_number
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.solver import Solver, schedule_for
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.levels import noise_levels
from fastsample.times.solver_timesteps import Times, fractional_timesteps
from fastsample.times.timesteps import Timesteps, spaced_timesteps

CONVENTIONS = ("mirror", "improved")


def inversion_table(
    t: np.ndarray,
    alpha: Float64Array,
    sigma: Float64Array,
    *,
    convention: str = "mirror",
    prediction: str = "epsilon",
    clip: Clip = None,
) -> Table:
    """The rows x' = alpha' x0 + sigma' epsilon from clean data to noise; see `ddim_invert` and `euler_invert`.

    Args:
        t: the decoder's times for the model, shape (N,), which descend.
        alpha, sigma: the decoder's noise levels, shape (N + 1,), from the noisiest to the one after the last row.
        convention, prediction, clip: as for `ddim_invert`.

    Raises:
        ValueError: for an unknown convention, and for a prediction that cannot work at one of the levels.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    mirror = convention == "mirror"
    if mirror and prediction == "x0" and sigma[-1] == 0:
        raise ValueError(
            "prediction='x0' does not tell the noise in clean data, where 'mirror' starts: give "
            "final_alpha_cumprod=schedule.alphas_cumprod[0], or convention='improved'"
        )
    t, alpha, sigma = t[::-1], alpha[::-1], sigma[::-1]
    if not mirror and prediction == "flow":
        t = 1000 * sigma[:-1]
    elif not mirror:
        alpha, sigma = np.append(alpha[1:], 0.0), np.append(sigma[1:], 1.0)
    return direction_table(
        t,
        alpha,
        sigma,
        direction=sigma[1:],
        s=0.0,
        prediction=prediction,
        clip=clip,
        # Clean data, where the mirror and a flow start, do not tell the noise.
        rederive_epsilon=clip is not None and not mirror and prediction != "flow",
    )


@dataclass(frozen=True)
class DDIMInverse(Sampler):
    """DDIM inversion: the arguments of `ddim_invert` that shape the table. Immutable and reusable.

    Example:
        >>> inverse = DDIMInverse(Schedule.linear(), steps=10)
        >>> inverse.table.t.tolist()
        [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    """

    schedule: Schedule
    steps: int = field(default=50, kw_only=True)
    timesteps: Timesteps = field(default="leading", kw_only=True)
    convention: str = field(default="mirror", kw_only=True)
    prediction: str = field(default="epsilon", kw_only=True)
    clip: Clip = field(default=None, kw_only=True)
    final_alpha_cumprod: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        t = self._spaced(spaced_timesteps)
        check_number("final_alpha_cumprod", self.final_alpha_cumprod)
        if self.prediction == "flow":
            raise ValueError("prediction='flow' has levels of its own: use fastsample.euler_invert")
        levels = noise_levels(self.schedule, t, self.final_alpha_cumprod if self.convention == "mirror" else 1.0)
        self._set(
            table=inversion_table(t, *levels, convention=self.convention, prediction=self.prediction, clip=self.clip)
        )

    def _own_options(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        _check_clean(x, options)
        return options


@dataclass(frozen=True)
class EulerInverse(Solver):
    """Euler's method backwards: the arguments of `euler_invert` that shape the table. Immutable and reusable.

    Example:
        >>> inverse = EulerInverse(prediction="flow", steps=4, timesteps="trailing", shift=3.0)
        >>> inverse.table.t.tolist()
        [500.0, 750.0, 900.0, 1000.0]
    """

    convention: str = field(default="mirror", kw_only=True)

    def __post_init__(self) -> None:
        levels = self._levels(fractional_timesteps)
        self._set(
            table=inversion_table(*levels, convention=self.convention, prediction=self.prediction, clip=self.clip)
        )

    def _own_options(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        _check_clean(x, options)
        return options


def _check_clean(x: Tensor | Sequence[int], options: dict[str, Any]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x0 must be a tensor, the samples to encode, got {type(x).__name__}")
    if options.get("mask") is not None or options.get("known") is not None:
        raise ValueError("mask and known belong to sampling, not to inversion")
    if options.get("strength") is not None:
        raise ValueError("strength adds noise to a clean sample; inversion goes from it as it is")


def ddim_invert(
    model: Model,
    x0: Tensor,
    *,
    convention: str = "mirror",
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "leading",
    prediction: str = "epsilon",
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """Encodes clean samples as noise: DDIM's ODE (Song, Meng & Ermon 2020) run backwards.

    `ddim` with the same arguments, from the result, is the decoder; the error of the round trip is of the order of a
    step where the model is smooth. Where samples have large flat areas at -1 or 1 (drawings) it is not, and "improved"
    does better. From the level of alpha bar a to the noisier one a':

        x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)
        x' = sqrt(a') x0 + sqrt(1 - a') epsilon

    Args:
        model: as for `ddim`.
        x0: the clean samples, float16, bfloat16, float32, or float64 for the reference backend. Never modified.
        convention: with the timesteps t_0 < t_1 < ... and their alpha bars a_0, a_1, ...
            - "mirror": from final_alpha_cumprod to a_0, a_1, ..., each with the model at the timestep that is reached:
              where `ddim` starts from, the levels it passes (diffusers' DDIMInverseScheduler);
            - "improved": x0 counts as level a_0; from a_k to a_(k+1) with the model at t_k, and from the last one to
              alpha bar 0 (improved-diffusion's ddim_reverse_sample).
        steps: model calls, where `timesteps` names a spacing; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, else Schedule.linear(1000).
        timesteps: see fastsample.spaced_timesteps.
        prediction: what the model predicts: "epsilon", "v" or "x0"; "mirror" needs final_alpha_cumprod < 1 for "x0".
            A flow is inverted by `euler_invert`.
        clip: clamp x0 to [-clip, clip]; a fastsample.DynamicThreshold; None for neither. "mirror" keeps the model's
            epsilon then, "improved" takes it from the new x0, as the code that they follow.
        final_alpha_cumprod: that of the decoder; unused by "improved".
        **options: the arguments of every sampler, documented in fastsample.Options, but for `strength`.

    Returns:
        The noise, float32 (float64 for a float64 x0).

    Raises:
        ValueError, TypeError: for an x0 that is not a tensor and other arguments that cannot work, before the model is
            called.

    Example:
        >>> from fastsample import ddim
        >>> x0 = torch.ones(1, 3, 8, 8)
        >>> noise = ddim_invert(lambda x, t: 0.1 * x, x0, steps=100)
        >>> round(float(ddim(lambda x, t: 0.1 * x, noise, steps=100).mean()), 2)
        1.03
    """
    sampler = sampler_of(
        DDIMInverse,
        schedule_of(model, schedule),
        steps=steps,
        timesteps=timesteps,
        convention=convention,
        prediction=prediction,
        clip=clip,
        final_alpha_cumprod=final_alpha_cumprod,
    )
    return sampler(model, x0, **options)


def euler_invert(
    model: Model,
    x0: Tensor,
    *,
    convention: str = "mirror",
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Times = "linspace",
    prediction: str = "epsilon",
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """Encodes clean samples as noise: the ODE of `euler` run backwards, that of a flow above all.

    `euler` with the same arguments, from the result, is the decoder; the error of the round trip is of the order of a
    step. From noise level (alpha, sigma) to the noisier one (alpha', sigma'):

        x' = alpha' x0 + sigma' epsilon

    with the x0 and epsilon that the model's output tells. For a flow that is x' = x + (sigma' - sigma) m.

    Args:
        model, x0: as for `ddim_invert`.
        convention: at which of the two levels the model is called.
            - "mirror": at the noisier one, which is reached: where `euler` starts from, the levels it passes;
            - "improved": at the one that x is at. A flow then begins at t = 0 and makes its last call before t = 1000;
              otherwise as for `ddim_invert`.
        clip, final_alpha_cumprod: as for `ddim_invert`; but a flow keeps the model's own epsilon after clipping.
        steps, schedule, timesteps, prediction, shift: as for `euler`.
        **options: the arguments of every sampler, documented in fastsample.Options, but for `strength`.

    Returns, raises: as `ddim_invert`.

    Example:
        >>> from fastsample import euler
        >>> x0 = torch.ones(1, 3, 8, 8)
        >>> noise = euler_invert(lambda x, t: 0.1 * x, x0, steps=100, prediction="flow")
        >>> round(float(euler(lambda x, t: 0.1 * x, noise, steps=100, prediction="flow").mean()), 2)
        1.0
    """
    sampler = EulerInverse(
        schedule_for(prediction, model, schedule),
        steps=steps,
        timesteps=timesteps,
        convention=convention,
        prediction=prediction,
        shift=shift,
        clip=clip,
        final_alpha_cumprod=final_alpha_cumprod,
    )
    return sampler(model, x0, **options)
