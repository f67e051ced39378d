"""The base of solvers that remember the entries of earlier rows: which order each row has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import integer
from fastsample.loop.options import CorrectX0
from fastsample.samplers.columns import x0_table
from fastsample.samplers.limits import limit_columns
from fastsample.samplers.solver import Solver, check_passable
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.solver_timesteps import solver_timesteps


@dataclass(frozen=True)
class Multistep(Solver):
    """A solver whose rows read the entries of those before. Subclasses add their arguments and `_columns`.

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        model: ... Here times are rounded, so that t is int64 but for a flow.
        timesteps: "auto", see `ddim`; "linspace" round(i (T - 1) / N), i = N .. 1; "leading" i (T // (N + 1)), for
            Stable Diffusion instead fastsample.solver_timesteps(1000, "leading", steps, steps_offset=1); "trailing";
            other spacings and the timesteps themselves as in fastsample.spaced_timesteps; "karras" and "log_snr": noise
            levels from that of T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly spaced, t rounded;
            "ays_sd15" or "ays_sdxl": Align Your Steps. For a flow "linspace", which "auto" is there, "trailing" or
            times, see fastsample.times.flow.flow_levels.
        clip: ... A DynamicThreshold is diffusers' thresholding.

    Raises:
        ValueError: for an order that there is not, a clip that is not positive, a prediction that cannot work at one of
            the levels, and where alpha bar is 1 at a timestep that is visited.
    """

    _: KW_ONLY
    steps: int = 20
    order: int = 2
    correct_x0: CorrectX0 | None = None

    _spacing: ClassVar[Callable[..., NDArray[Any]]] = staticmethod(solver_timesteps)
    _most_order: ClassVar[int] = 3

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, start: int = 0) -> Table:
        """As of every solver; `start` is the row that has no history: from there the order rises from 1 again."""
        limit_columns(self.clip)  # of several mistakes a wrong clip is the first that is told
        if integer("order", self.order) not in range(1, self._most_order + 1):
            lower = ", ".join(map(str, range(1, self._most_order)))
            raise ValueError(f"order must be {lower} or {self._most_order}, got {self.order!r}")
        orders = self._orders_from(start, alpha, sigma)
        check_passable(sigma)
        columns = self._columns(t, alpha, sigma, orders, start)
        t = t if self.prediction == "flow" else np.rint(t).astype(np.int64)
        return x0_table(t, alpha, sigma, prediction=self.prediction, clip=self.clip, **columns)

    def _orders_from(self, start: int, alpha: Float64Array, sigma: Float64Array) -> NDArray[np.int64]:
        """The order of each row of a run that starts at this one."""
        k = np.arange(len(alpha) - 1)
        return self._orders(np.minimum(self.order, np.where(k < start, k, k - start) + 1), alpha, sigma)

    def _orders(self, rising: NDArray[np.int64], alpha: Float64Array, sigma: Float64Array) -> NDArray[np.int64]:
        """The order of each row, of orders that are no more than rows since the start."""
        return rising

    def _columns(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64], start: int
    ) -> dict[str, Any]:
        """The columns of a run through these times and levels but for those that make x0."""
        raise NotImplementedError

    def table_from(self, row: int) -> Table:
        """The table of a run that starts at this row: from there its order rises from 1 again."""
        t, alpha, sigma = self.table.t, self.table.alpha, self.table.sigma
        assert alpha is not None and sigma is not None
        return self._rows(t, alpha, sigma, start=row)


def lower_at_the_end(orders: NDArray[np.int64]) -> NDArray[np.int64]:
    """These orders, but that the last row has order 1 and the last but one at most 2, as if history could go on."""
    return np.minimum(orders, len(orders) - np.arange(len(orders)))


def of_finite_levels(orders: NDArray[np.int64], alpha: Float64Array) -> NDArray[np.int64]:
    """These orders where entries of pure noise, at an infinite sigma / alpha, count for nothing."""
    infinite = int((alpha[:-1] == 0).sum())
    return np.minimum(orders, np.maximum(np.arange(len(orders)) + 1 - infinite, 1))


def widths(alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """Of each row in lambda = log(alpha / sigma); infinite at pure noise and at clean data."""
    with np.errstate(divide="ignore"):
        found: Float64Array = np.diff(np.log(alpha) - np.log(sigma))
    return found
