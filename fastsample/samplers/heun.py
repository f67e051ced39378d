"""Heun's method (Karras et al. 2022, algorithm 1 without churn): two rows a step, and Euler's for the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.loop import CorrectX0
from fastsample.loop.options import Options
from fastsample.model import Model
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, limit_columns
from fastsample.samplers.solver import Solver, schedule_for
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.predictions import x0_coefficients
from fastsample.times.solver_timesteps import Times, fractional_timesteps


def heun_table(
    t: NDArray, alpha: Float64Array, sigma: Float64Array, *, prediction: str = "epsilon", clip: Clip = None
) -> Table:
    """The rows of Heun's method from noise level (alpha, sigma) to (alpha', sigma'), two for all but the last:

        predictor: x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0
        corrector: x'' = x' + g (x0' - h1),  g = (alpha'^2 sigma / (alpha sigma') - alpha') / 2

    where h1 is the predictor's x0 and x0' that of the model at x'. It averages the slopes (y - x0)/r of y = x / alpha
    over r = sigma / alpha. A flow averages (x - x0)/sigma, its own velocity, so that g = (sigma / sigma' - 1) / 2.

    Args:
        t: times for the model, shape (N,).
        alpha, sigma: noise levels, shape (N + 1,), from the noisiest to the one after the last step.
        prediction, clip: as for `heun`.

    Returns:
        A table of 2 N - 1 rows.

    Raises:
        ValueError: for a clip that is not positive, a prediction that cannot work at one of the levels, and a level
            of pure noise (unless of a flow) or without noise before the last.
    """
    limits = limit_columns(clip)
    if (sigma[:-1] == 0).any():
        raise ValueError("a solver cannot pass a level where sigma is 0 (alpha bar 1): leave that timestep out")
    if prediction != "flow" and (alpha == 0).any():
        raise ValueError("Heun's method cannot start where alpha bar is 0 (zero terminal SNR): leave that timestep out")
    # The level of each row: 0, then 1, 1, 2, 2, ... and what is after the last.
    level = (np.arange(2 * len(t)) + 1) // 2
    kept = sigma[1:] / sigma[:-1]
    scale = np.ones_like(alpha) if prediction == "flow" else alpha
    g = scale[1:-1] * (scale[1:-1] / scale[:-2] / kept[:-1] - 1) / 2
    p, q = x0_coefficients(prediction, alpha[:-1], sigma[:-1])
    a, b, c1 = np.ones(len(level) - 1), np.empty(len(level) - 1), np.zeros(len(level) - 1)
    a[::2], b[::2] = kept, alpha[1:] - alpha[:-1] * kept
    b[1::2], c1[1::2] = g, -g
    t, p, q = (column[level[:-1]] for column in (t, p, q))
    return Table(t, p=p, q=q, a=a, b=b, c1=c1, alpha=alpha[level], sigma=sigma[level], **limits)


@dataclass(frozen=True)
class Heun(Solver):
    """A Heun sampler: the arguments of `heun` that shape the table. Immutable and reusable.

    Example:
        >>> sampler = Heun(Schedule.linear(), steps=10, timesteps="karras")
        >>> len(sampler.table)
        19
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    steps: int = field(default=25, kw_only=True)
    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)

    _rows_a_step: ClassVar[int] = 2

    def __post_init__(self) -> None:
        levels = self._levels(fractional_timesteps)
        self._set(table=heun_table(*levels, prediction=self.prediction, clip=self.clip))


def heun(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 25,
    schedule: Schedule | None = None,
    timesteps: Times = "linspace",
    prediction: str = "epsilon",
    shift: float = 1.0,
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    final_alpha_cumprod: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """Samples with Heun's method (Karras et al. 2022), of second order, at 2 `steps` - 1 model calls.

    As diffusers' HeunDiscreteScheduler (and, without churn, k-diffusion's sample_heun), but that the state is x, what
    the model is given; for a flow as FlowMatchHeunDiscreteScheduler. The formulas are in `heun_table`. Where a schedule
    begins next to pure noise (Schedule.cosine) take timesteps="karras": a uniform first step is too long for it.

    Args:
        steps: times visited; row, `noise`, `start_step` and fastsample.Step count model calls, 2 a step.
        the others: as for `euler`.

    Returns, raises: as `euler`; ValueError also where alpha bar is 0 or 1 at a timestep that is visited.

    Example:
        >>> heun(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
    """
    sampler = sampler_of(
        Heun,
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
