"""Euler and Euler ancestral: DDIM with eta = 0 and 1 (the state stays variance preserving), at k-diffusion's levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.loop import CorrectX0
from fastsample.loop.options import Options
from fastsample.model import Model
from fastsample.samplers.ddim import ddim_table
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip
from fastsample.samplers.solver import Solver, schedule_for
from fastsample.schedule import Schedule
from fastsample.times.solver_timesteps import Times, fractional_timesteps


@dataclass(frozen=True)
class Euler(Solver):
    """An Euler sampler: the arguments of `euler` that shape the table. Immutable and reusable.

    Example:
        >>> sampler = Euler(Schedule.linear(), steps=30, timesteps="karras")
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> Euler(prediction="flow", steps=4, shift=3.0).table.t.round().tolist()
        [1000.0, 858.0, 602.0, 9.0]
    """

    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)

    _eta: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        t, alpha, sigma = self._levels(fractional_timesteps)
        self._set(
            table=ddim_table(
                t,
                alpha,
                sigma,
                eta=self._eta,
                prediction=self.prediction,
                clip=self.clip,
                corrects_x0=self.correct_x0 is not None,
            )
        )


@dataclass(frozen=True)
class EulerAncestral(Euler):
    """An Euler ancestral sampler: the arguments of `euler_ancestral` that shape the table. Immutable and reusable.

    Example:
        >>> sampler = EulerAncestral(Schedule.linear(), steps=30)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    _eta: ClassVar[float] = 1.0


def euler(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Times = "linspace",
    prediction: str = "epsilon",
    shift: float = 1.0,
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    final_alpha_cumprod: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """Samples with Euler's method on the diffusion ODE dy/dr = (y - x0)/r, y = x / alpha, r = sigma / alpha.

        x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0

    This is DDIM with eta = 0, at the noise levels of diffusers' EulerDiscreteScheduler (and k-diffusion), whose state
    is y; ours is x, what the model is given (they draw y_T with the deviation r_T, we x_T with 1). For a flow it is
    x' = x + (sigma' - sigma) m, as diffusers' FlowMatchEulerDiscreteScheduler.

    Args:
        model, x: as for `ddim`. The model is given t float32 where times are fractional (the default), else int64.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, else Schedule.linear(1000). None for a
            flow.
        timesteps: "linspace" i (T - 1) / (N - 1), not rounded: sigma / alpha is interpolated between whole timesteps;
            "karras" or "log_snr": N levels from that of T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly
            spaced, t interpolated; the times themselves, whole or fractional; "leading", "trailing" and the others of
            fastsample.spaced_timesteps. For a flow "linspace", "trailing" or times (1000 sigma), see
            fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow matching.
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; a fastsample.DynamicThreshold; None for neither.
        correct_x0: as for `ddim`.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
        **options: the arguments of every sampler, documented in fastsample.Options.

    Returns, raises: as `ddim`.

    Example:
        >>> euler(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> euler(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=4, prediction="flow", shift=3.0).shape
        torch.Size([4, 3, 8, 8])
    """
    sampler = sampler_of(
        Euler,
        schedule_for(prediction, model, schedule),
        steps=steps,
        timesteps=timesteps,
        prediction=prediction,
        shift=shift,
        clip=clip,
        correct_x0=correct_x0,
        final_alpha_cumprod=final_alpha_cumprod,
    )
    return sampler(model, x, **options)


def euler_ancestral(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Times = "linspace",
    prediction: str = "epsilon",
    shift: float = 1.0,
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    final_alpha_cumprod: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """Samples with Euler's method down to less noise than the next level has, and makes up the difference afresh.

    With r = sigma / alpha and y = x / alpha:

        up^2 = r'^2 (1 - r'^2 / r^2),  down^2 = r'^2 - up^2
        y' = y + (down - r) (y - x0)/r + up z

    This is DDIM with eta = 1, as diffusers' EulerAncestralDiscreteScheduler (and k-diffusion's sample_euler_ancestral).

    Args, returns, raises: as `euler`.

    Example:
        >>> euler_ancestral(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
    """
    sampler = sampler_of(
        EulerAncestral,
        schedule_for(prediction, model, schedule),
        steps=steps,
        timesteps=timesteps,
        prediction=prediction,
        shift=shift,
        clip=clip,
        correct_x0=correct_x0,
        final_alpha_cumprod=final_alpha_cumprod,
    )
    return sampler(model, x, **options)
