"""DPM-Solver++ (Lu et al. 2022): multistep solvers of order 1 to 3 that remember the x0 of earlier rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.multistep import Multistep, lower_at_the_end, widths
from fastsample.samplers.sampling_function import sampling_function
from fastsample.schedule import Float64Array


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Multistep):
    """Samples from a diffusion model with multistep DPM-Solver++ (Lu et al. 2022): good samples in 10 to 25 calls.

    The diffusion ODE is solved exactly but for x0, which is taken as a polynomial in lambda = log(alpha / sigma)
    through that of this row and of the `order` - 1 rows before it. From noise level (alpha, sigma) to (alpha', sigma'),
    with w = lambda' - lambda the width of this row, w1 and w2 those of the last two, and n = 1:

        order 1: x' = sigma'/sigma e^-(n-1)w x + alpha' E x0,  E = 1 - e^-nw
        order 2: ... + alpha' E w/2 D1
        order 3: ... + alpha' ((nw - E)/n (D1 + w1 D2) + (w^2/2 - (nw - E)/n^2) D2)

    where D1 = (x0 - h1)/w1 and D2 = (D1 - (h1 - h2)/w2)/(w1 + w2) are divided differences of x0 over lambda, h1 and h2
    the x0 of the last two rows. With `sde` the diffusion's reverse SDE is solved: n = 2, and sigma' sqrt(1 - e^-2w) z
    is added. These are diffusers' DPMSolverMultistepScheduler with "dpmsolver++" or "sde-dpmsolver++" and "midpoint",
    and order 1 is DDIM. (In order 3 of the SDE diffusers 0.42 has another sign before w^2/2, with which its order is 1;
    here it is k-diffusion's.)

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        order: 1, 2 or 3; 2 is best under guidance, 3 without. The first rows are of lower order.
        final_alpha_cumprod: ... At 1 the last row is of order 1.
        lower_order_final: below 15 steps, take the last two rows with orders 2 and 1.
        sde: whether to add noise in every row that does not end in clean data: more steps, more variety.

    Raises:
        ValueError: for an order other than 1, 2 or 3, a clip that is not positive, a prediction that cannot work at one
            of the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> dpm_solver(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = DPMSolver(Schedule.linear(), steps=20, sde=True)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    lower_order_final: bool = True
    sde: bool = False

    def _orders(self, rising: NDArray[np.int64], alpha: Float64Array, sigma: Float64Array) -> NDArray[np.int64]:
        orders = lower_at_the_end(rising) if self.lower_order_final and len(rising) < 15 else rising.copy()
        if sigma[-1] == 0:  # at an infinite width
            orders[-1] = 1
        return orders

    def _columns(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64], start: int
    ) -> dict[str, Any]:
        w, n = widths(alpha, sigma), 2 if self.sde else 1
        e = -np.expm1(-n * w)
        b, c1, c2 = alpha[1:] * e, np.zeros_like(w), np.zeros_like(w)

        k = np.flatnonzero(orders == 2)
        of_d1 = alpha[k + 1] * e[k] * w[k] / 2
        b[k] += of_d1 / w[k - 1]
        c1[k] = -of_d1 / w[k - 1]

        k = np.flatnonzero(orders == 3)
        w1, w2 = w[k - 1], w[k - 2]
        of_d1 = alpha[k + 1] * (n * w[k] - e[k]) / n
        of_d2 = (of_d1 * (w1 - 1 / n) + alpha[k + 1] * w[k] ** 2 / 2) / (w1 + w2)  # here of D1 - (h1 - h2)/w2
        b[k] += (of_d1 + of_d2) / w1
        c1[k] = -(of_d1 + of_d2) / w1 - of_d2 / w2
        c2[k] = of_d2 / w2
        columns = {"a": sigma[1:] / sigma[:-1], "b": b, "c1": c1, "c2": c2}
        if self.sde:
            columns |= {"a": columns["a"] * np.exp(-w), "s": sigma[1:] * np.sqrt(-np.expm1(-2 * w))}
        return columns


dpm_solver = sampling_function(DPMSolver, "dpm_solver")
