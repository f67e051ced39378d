"""The stochastic sampler of distilled models (Meng et al. 2023): two steps forward, and one back with fresh noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.columns import direction_table
from fastsample.samplers.limits import Clip
from fastsample.samplers.spaced import Spaced
from fastsample.schedule import Float64Array
from fastsample.tables import Table


@dataclass(frozen=True, kw_only=True)
class Stochastic(Spaced):
    """From timestep t_k a DDIM step to t_(k + 2), and noise that leads back to t_(k + 1), one call of the model each:

        x_s = alpha_(k + 2) x0 + sigma_(k + 2) epsilon
        x'  = r x_s + sqrt(1 - r^2) z,  r = alpha_(k + 1) / alpha_(k + 2)

    with clean data after the last timestep, where the last row leads without noise. Arguments as for fastsample.DDIM.

    Example:
        >>> from fastsample import Schedule
        >>> sampler = Stochastic(Schedule.scaled_linear(), steps=4)
        >>> [bool(s) for s in sampler.table.s]
        [True, True, True, False]
    """

    prediction: str = "epsilon"
    clip: Clip = None

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        # By two levels on, the last of which is clean data.
        further, noise = np.append(alpha[2:], alpha[-1]), np.append(sigma[2:], sigma[-1])
        r = alpha[1:] / further
        return direction_table(
            t,
            alpha,
            sigma,
            direction=r * noise,
            s=np.sqrt(np.maximum(1 - r**2, 0)),
            prediction=self.prediction,
            clip=self.clip,
            rederive_epsilon=self.clip is not None,
        )
