"""DPM-Solver++ (Lu et al. 2022): multistep solvers of order 1 to 3 that remember the x0 of earlier rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import integer
from fastsample.loop.options import CorrectX0
from fastsample.samplers.columns import x0_table
from fastsample.samplers.limits import limit_columns
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.solver import Solver, check_passable
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.solver_timesteps import solver_timesteps


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Solver):
    """Samples from a diffusion model with multistep DPM-Solver++ (Lu et al. 2022): good samples in 10 to 25 calls.

    The diffusion ODE is solved exactly but for x0, which is taken as a polynomial in lambda = log(alpha / sigma)
    through that of this row and of the `order` - 1 rows before it. From noise level (alpha, sigma) to (alpha', sigma'),
    with w = lambda' - lambda the width of this row, w1 and w2 those of the last two:

        order 1: x' = sigma'/sigma x + alpha' (1 - e^-w) x0
        order 2: ... + alpha' (1 - e^-w) w/2 D1
        order 3: ... + alpha' ((e^-w - 1 + w) (D1 + w1 D2) - (e^-w - 1 + w - w^2/2) D2)

    where D1 = (x0 - h1)/w1 and D2 = (D1 - (h1 - h2)/w2)/(w1 + w2) are divided differences of x0 over lambda, h1 and h2
    the x0 of the last two rows. These are diffusers' DPMSolverMultistepScheduler with "dpmsolver++" and "midpoint", and
    order 1 is DDIM.

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        model: ... Here times are rounded, so that t is int64 but for a flow.
        order: 1, 2 or 3; 2 is best under guidance, 3 without. The first rows are of lower order.
        timesteps: "auto", see `ddim`; "linspace" round(i (T - 1) / N), i = N .. 1; "leading" i (T // (N + 1)), for
            Stable Diffusion instead fastsample.solver_timesteps(1000, "leading", steps, steps_offset=1); "trailing";
            other spacings and the timesteps themselves as in fastsample.spaced_timesteps; "karras" and "log_snr": noise
            levels from that of T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly spaced, t rounded. For a
            flow "linspace", which "auto" is there, "trailing" or times, see fastsample.times.flow.flow_levels.
        clip: ... A DynamicThreshold is diffusers' thresholding.
        final_alpha_cumprod: ... At 1 the last row is of order 1.
        lower_order_final: below 15 steps, take the last two rows with orders 2 and 1.

    Raises:
        ValueError: for an order other than 1, 2 or 3, a clip that is not positive, a prediction that cannot work at one
            of the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> dpm_solver(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = DPMSolver(Schedule.linear(), steps=20)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    steps: int = 20
    order: int = 2
    lower_order_final: bool = True
    correct_x0: CorrectX0 | None = None

    _spacing: ClassVar[Callable[..., NDArray[Any]]] = staticmethod(solver_timesteps)

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, start: int = 0) -> Table:
        """As of every solver; `start` is the row that has no history: from there the order rises from 1 again."""
        limit_columns(self.clip)  # of several mistakes a wrong clip is the first that is told
        orders = self._orders(len(t), start, to_clean_data=sigma[-1] == 0)
        check_passable(sigma)
        with np.errstate(divide="ignore"):  # infinite at pure noise and at clean data
            w = np.diff(np.log(alpha) - np.log(sigma))
        decay = np.expm1(-w)  # e^-w - 1
        b, c1, c2 = -alpha[1:] * decay, np.zeros_like(w), np.zeros_like(w)

        k = np.flatnonzero(orders == 2)
        of_d1 = -alpha[k + 1] * decay[k] * w[k] / 2
        b[k] += of_d1 / w[k - 1]
        c1[k] = -of_d1 / w[k - 1]

        k = np.flatnonzero(orders == 3)
        w1, w2 = w[k - 1], w[k - 2]
        of_d1 = alpha[k + 1] * (decay[k] + w[k])
        of_d2 = (of_d1 * (w1 - 1) + alpha[k + 1] * w[k] ** 2 / 2) / (w1 + w2)  # here of D1 - (h1 - h2)/w2
        b[k] += (of_d1 + of_d2) / w1
        c1[k] = -(of_d1 + of_d2) / w1 - of_d2 / w2
        c2[k] = of_d2 / w2

        t = t if self.prediction == "flow" else np.rint(t).astype(np.int64)
        columns = {"a": sigma[1:] / sigma[:-1], "b": b, "c1": c1, "c2": c2}
        return x0_table(t, alpha, sigma, prediction=self.prediction, clip=self.clip, **columns)

    def _orders(self, rows: int, start: int, to_clean_data: bool) -> NDArray[np.int64]:
        """The order of each row: no more than rows since the start, and low again at the end."""
        if integer("order", self.order) not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order!r}")
        k = np.arange(rows)
        orders = np.minimum(self.order, np.where(k < start, k, k - start) + 1)
        if self.lower_order_final and rows < 15:
            orders = np.minimum(orders, rows - k)
        if to_clean_data:  # at an infinite width
            orders[-1] = 1
        return orders

    def table_from(self, row: int) -> Table:
        """The table of a run that starts at this row: its order rises from 1 again there, for want of earlier x0."""
        t, alpha, sigma = self.table.t, self.table.alpha, self.table.sigma
        assert alpha is not None and sigma is not None
        return self._rows(t, alpha, sigma, start=row)


dpm_solver = sampling_function(DPMSolver, "dpm_solver")
