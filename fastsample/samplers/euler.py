"""Euler and Euler ancestral: DDIM with eta = 0 and 1 (the state stays variance preserving), at k-diffusion's levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from fastsample.loop.options import CorrectX0
from fastsample.samplers.columns import direction_table
from fastsample.samplers.ddim import noise_and_direction
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.solver import Solver
from fastsample.schedule import Float64Array
from fastsample.tables import Table


@dataclass(frozen=True, kw_only=True)
class Euler(Solver):
    """Samples with Euler's method on the diffusion ODE dy/dr = (y - x0)/r, y = x / alpha, r = sigma / alpha.

        x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0

    This is DDIM with eta = 0, at the noise levels of diffusers' EulerDiscreteScheduler (and k-diffusion), whose state
    is y; ours is x, what the model is given (they draw y_T with the deviation r_T, we x_T with 1). For a flow it is
    x' = x + (sigma' - sigma) m, as diffusers' FlowMatchEulerDiscreteScheduler.

    Example:
        >>> from fastsample import Schedule
        >>> euler(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> euler(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=4, prediction="flow", shift=3.0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = Euler(Schedule.linear(), steps=30, timesteps="karras")
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> Euler(prediction="flow", steps=4, shift=3.0).table.t.round().tolist()
        [1000.0, 858.0, 602.0, 9.0]
    """

    correct_x0: CorrectX0 | None = None

    _eta: ClassVar[float] = 0.0

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        s, direction = noise_and_direction(self._eta, alpha, sigma)
        return direction_table(
            t,
            alpha,
            sigma,
            direction,
            s,
            prediction=self.prediction,
            clip=self.clip,
            rederive_epsilon=self.clip is not None or self.correct_x0 is not None,
        )


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Euler):
    """Samples with Euler's method down to less noise than the next level has, and makes up the difference afresh.

    With r = sigma / alpha and y = x / alpha:

        up^2 = r'^2 (1 - r'^2 / r^2),  down^2 = r'^2 - up^2
        y' = y + (down - r) (y - x0)/r + up z

    This is DDIM with eta = 1, as diffusers' EulerAncestralDiscreteScheduler (and k-diffusion's sample_euler_ancestral).

    Example:
        >>> from fastsample import Schedule
        >>> euler_ancestral(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = EulerAncestral(Schedule.linear(), steps=30)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    _eta: ClassVar[float] = 1.0


euler = sampling_function(Euler, "euler")
euler_ancestral = sampling_function(EulerAncestral, "euler_ancestral")
