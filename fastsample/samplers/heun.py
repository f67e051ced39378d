"""Heun's method (Karras et al. 2022, algorithm 1 without churn): two rows a step, and Euler's for the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastsample.loop.options import CorrectX0
from fastsample.samplers.columns import x0_table
from fastsample.samplers.limits import limit_columns
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.solver import Solver, check_passable
from fastsample.schedule import Float64Array
from fastsample.tables import Table


@dataclass(frozen=True, kw_only=True)
class Heun(Solver):
    """Samples with Heun's method (Karras et al. 2022), of second order, at 2 `steps` - 1 model calls.

    From noise level (alpha, sigma) to (alpha', sigma'), two rows for all steps but the last:

        predictor: x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0
        corrector: x'' = x' + g (x0' - h1),  g = (alpha'^2 sigma / (alpha sigma') - alpha') / 2

    where h1 is the predictor's x0 and x0' that of the model at x'. It averages the slopes (y - x0)/r of y = x / alpha
    over r = sigma / alpha. A flow averages (x - x0)/sigma, its own velocity, so that g = (sigma / sigma' - 1) / 2.

    As diffusers' HeunDiscreteScheduler (and, without churn, k-diffusion's sample_heun), but that the state is x, what
    the model is given; for a flow as FlowMatchHeunDiscreteScheduler. Where a schedule begins next to pure noise
    (Schedule.cosine) "linspace" has too long a first step for it: take timesteps="karras" or the default. "auto" starts
    v and x0 models where it starts epsilon models: the corrector multiplies errors in x0 too.

    Args:
        steps: times visited; row, `noise`, `start_step` and fastsample.Step count model calls, 2 a step.

    Raises:
        ValueError: where alpha bar is 0 (unless of a flow) or 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> heun(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = Heun(Schedule.linear(), steps=10, timesteps="karras")
        >>> len(sampler.table)
        19
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    steps: int = 25
    correct_x0: CorrectX0 | None = None

    _rows_a_step: ClassVar[int] = 2
    _amplifies_x0: ClassVar[bool] = True  # the corrector's g

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        limit_columns(self.clip)  # of several mistakes a wrong clip is the first that is told
        check_passable(sigma)
        flow = self.prediction == "flow"
        if not flow and (alpha == 0).any():
            raise ValueError(
                "Heun's method cannot start where alpha bar is 0 (zero terminal SNR): leave that timestep out"
            )
        kept = sigma[1:] / sigma[:-1]
        scale = np.ones_like(alpha) if flow else alpha
        g = scale[1:-1] * (scale[1:-1] / scale[:-2] / kept[:-1] - 1) / 2
        rows = 2 * len(t) - 1
        a, b, c1 = np.ones(rows), np.empty(rows), np.zeros(rows)
        a[::2], b[::2] = kept, alpha[1:] - alpha[:-1] * kept
        b[1::2], c1[1::2] = g, -g
        # The level of each row: 0, then 1, 1, 2, 2, ... and what is after the last.
        level = (np.arange(rows + 1) + 1) // 2
        return x0_table(
            t[level[:-1]], alpha[level], sigma[level], prediction=self.prediction, clip=self.clip, a=a, b=b, c1=c1
        )


heun = sampling_function(Heun, "heun")
