"""DPM-Solver++ (Lu et al. 2022): multistep solvers of order 1 to 3 that remember the x0 of earlier rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Unpack

from fastsample.checks import integer
from fastsample.loop.loop import CorrectX0
from fastsample.loop.options import Options
from fastsample.model import Model
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, limit_columns
from fastsample.samplers.solver import Solver, schedule_for
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.predictions import x0_coefficients
from fastsample.times.solver_timesteps import Times, solver_timesteps
from fastsample.times.timesteps import check_steps


def dpm_solver_table(
    t: NDArray,
    alpha: Float64Array,
    sigma: Float64Array,
    *,
    order: int = 2,
    prediction: str = "epsilon",
    clip: Clip = None,
    lower_order_final: bool = True,
    start: int = 0,
) -> Table:
    """The rows of multistep DPM-Solver++ from noise level (alpha, sigma) to (alpha', sigma').

    In lambda = log(alpha / sigma), with w = lambda' - lambda the width of this row, w1 and w2 those of the last two:

        order 1: x' = sigma'/sigma x + alpha' (1 - e^-w) x0
        order 2: ... + alpha' (1 - e^-w) w/2 D1
        order 3: ... + alpha' ((e^-w - 1 + w) (D1 + w1 D2) - (e^-w - 1 + w - w^2/2) D2)

    where D1 = (x0 - h1)/w1 and D2 = (D1 - (h1 - h2)/w2)/(w1 + w2) are divided differences of x0 over lambda.

    Args:
        t: times for the model, shape (N,).
        alpha, sigma: noise levels, shape (N + 1,), from the noisiest to the one after the last row.
        order, prediction, clip, lower_order_final: as for `dpm_solver`.
        start: the row that has no history: from there the order rises from 1 again.

    Raises:
        ValueError: for an order other than 1, 2 or 3, a clip that is not positive, a prediction that cannot work at one
            of the levels, and a level without noise before the last.
    """
    limits = limit_columns(clip)
    p, q = x0_coefficients(prediction, alpha[:-1], sigma[:-1])
    orders = _orders(len(t), order, start, lower_order_final, to_clean_data=sigma[-1] == 0)
    if (sigma[:-1] == 0).any():
        raise ValueError("a solver cannot pass a level where sigma is 0 (alpha bar 1): leave that timestep out")
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
    return Table(t, p=p, q=q, a=sigma[1:] / sigma[:-1], b=b, c1=c1, c2=c2, alpha=alpha, sigma=sigma, **limits)


def _orders(rows: int, order: int, start: int, lower_order_final: bool, to_clean_data: bool) -> NDArray[np.int64]:
    """The order of each row: no more than rows since the start, and low again at the end."""
    check_steps(rows)
    if integer("order", order) not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    k = np.arange(rows)
    orders = np.minimum(order, np.where(k < start, k, k - start) + 1)
    if lower_order_final and rows < 15:
        orders = np.minimum(orders, rows - k)
    if to_clean_data:  # at an infinite width
        orders[-1] = 1
    return orders


@dataclass(frozen=True)
class DPMSolver(Solver):
    """A DPM-Solver++ sampler: the arguments of `dpm_solver` that shape the table. Immutable and reusable.

    Example:
        >>> sampler = DPMSolver(Schedule.linear(), steps=20)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    steps: int = field(default=20, kw_only=True)
    order: int = field(default=2, kw_only=True)
    lower_order_final: bool = field(default=True, kw_only=True)
    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        t, alpha, sigma = self._levels(solver_timesteps)
        whole = t if self.prediction == "flow" else np.rint(t).astype(np.int64)
        self._set(table=self._rows(whole, alpha, sigma, start=0))

    def _rows(self, t: NDArray, alpha: Float64Array, sigma: Float64Array, start: int) -> Table:
        return dpm_solver_table(
            t,
            alpha,
            sigma,
            order=self.order,
            prediction=self.prediction,
            clip=self.clip,
            lower_order_final=self.lower_order_final,
            start=start,
        )

    def table_from(self, row: int) -> Table:
        """The table of a run that starts at this row: its order rises from 1 again there, for want of earlier x0."""
        t, alpha, sigma = self.table.t, self.table.alpha, self.table.sigma
        assert alpha is not None and sigma is not None
        return self._rows(t, alpha, sigma, start=row)


def dpm_solver(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 20,
    order: int = 2,
    schedule: Schedule | None = None,
    timesteps: Times = "linspace",
    prediction: str = "epsilon",
    shift: float = 1.0,
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    final_alpha_cumprod: float = 1.0,
    lower_order_final: bool = True,
    **options: Unpack[Options],
) -> Tensor:
    """Samples from a diffusion model with multistep DPM-Solver++ (Lu et al. 2022): good samples in 10 to 25 calls.

    The diffusion ODE is solved exactly but for x0, which is taken as a polynomial in lambda = log(alpha / sigma)
    through that of this row and of the `order` - 1 rows before it (the formulas are in `dpm_solver_table`). These are
    diffusers' DPMSolverMultistepScheduler with "dpmsolver++" and "midpoint", and order 1 is DDIM.

    Args:
        model, x: as for `ddim`. The model is given t int64, but float32 for prediction "flow".
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        order: 1, 2 or 3; 2 is best under guidance, 3 without. The first rows are of lower order.
        schedule: the one the model was trained with; default `model.schedule`, else Schedule.linear(1000). None for a
            flow.
        timesteps: "linspace" round(i (T - 1) / N), i = N .. 1; "leading" i (T // (N + 1)), for Stable Diffusion instead
            fastsample.solver_timesteps(1000, "leading", steps, steps_offset=1); "trailing"; other spacings and the
            timesteps themselves as in fastsample.spaced_timesteps; "karras" and "log_snr": noise levels from that of
            T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly spaced, t rounded. For a flow "linspace",
            "trailing" or times, see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow matching.
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s).
        clip: clamp x0 to [-clip, clip]; a fastsample.DynamicThreshold (diffusers' thresholding); None for neither.
        correct_x0: as for `ddim`.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min"). At 1 the last row is of order 1.
        lower_order_final: below 15 steps, take the last two rows with orders 2 and 1.
        **options: the arguments of every sampler, documented in fastsample.Options.

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Returns, raises: as `ddim`; ValueError also where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> dpm_solver(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
    """
    sampler = sampler_of(
        DPMSolver,
        schedule_for(prediction, model, schedule),
        steps=steps,
        order=order,
        timesteps=timesteps,
        prediction=prediction,
        shift=shift,
        clip=clip,
        correct_x0=correct_x0,
        final_alpha_cumprod=final_alpha_cumprod,
        lower_order_final=lower_order_final,
    )
    return sampler(model, x, **options)
