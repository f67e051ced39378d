"""iPNDM (Zhang & Chen 2022, "Fast sampling of diffusion models with exponential integrator"): Adams-Bashforth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.adams_bashforth import AdamsBashforth
from fastsample.samplers.sampling_function import sampling_function
from fastsample.schedule import Float64Array

_COEFFICIENTS = (
    np.array([1, 0, 0, 0]),
    np.array([3, -1, 0, 0]) / 2,
    np.array([23, -16, 5, 0]) / 12,
    np.array([55, -59, 37, -9]) / 24,
)  # of steps of one size, by order


@dataclass(frozen=True, kw_only=True)
class IPNDM(AdamsBashforth):
    """Samples with iPNDM (Zhang & Chen 2022): Adams-Bashforth on epsilon, the best solver in 4 to 10 calls.

    With y = x / alpha, r = sigma / alpha and e, h1, h2, h3 the epsilon of this row and of the three before it:

        order 1: y' = y + (r' - r) e
        order 2: y' = y + (r' - r) (3 e - h1) / 2
        order 3: y' = y + (r' - r) (23 e - 16 h1 + 5 h2) / 12
        order 4: y' = y + (r' - r) (55 e - 59 h1 + 37 h2 - 9 h3) / 24

    The coefficients are those of steps of one size, as in the papers' code (zju-pi/diff-sampler), whatever the steps
    are; the first rows are of lower order. Order 1 is DDIM. For a flow y is x, r is sigma and e is the velocity z - x0.
    (diffusers' IPNDMScheduler knows neither a schedule nor what the model predicts.)

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        order: 1 to 4.

    Raises:
        ValueError: for an order other than 1 to 4, a clip that is not positive, a prediction that cannot work at one of
            the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> ipndm(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=6, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> IPNDM(Schedule.linear(), steps=5).table.reads
        (0, 1, 2, 3, 3)
    """

    steps: int = 10
    order: int = 4

    _most_order: ClassVar[int] = 4

    def _weights(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64]
    ) -> Float64Array:
        with np.errstate(divide="ignore"):
            r = sigma if self._extrapolates_velocity else sigma / alpha
        step = np.where(orders > 1, np.diff(np.where(np.isinf(r), 0, r)), 0)  # a row of order 1 has but its own
        coefficients: Float64Array = np.array([_COEFFICIENTS[order - 1] for order in orders])
        return step[:, None] * coefficients


ipndm = sampling_function(IPNDM, "ipndm")
