"""DEIS (Zhang & Chen 2022): epsilon as a polynomial through earlier rows, integrated exactly."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import one_of
from fastsample.samplers.adams_bashforth import AdamsBashforth
from fastsample.samplers.multistep import lower_at_the_end, of_finite_levels
from fastsample.samplers.sampling_function import sampling_function
from fastsample.schedule import Float64Array, checked_schedule

DEISVariant = Literal["log_rho", "tab"]
VARIANTS: tuple[DEISVariant, ...] = get_args(DEISVariant)
_MOST = 1e9  # sigma / alpha of what counts as pure noise
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True, kw_only=True)
class DEIS(AdamsBashforth):
    """Samples with DEIS (Zhang & Chen 2022): epsilon is extrapolated by a polynomial through the last `order` rows.

    With y = x / alpha, r = sigma / alpha, and L_j the polynomials that are 1 at one of these rows and 0 at the others:

        y' = y + e int L_0 dr + h1 int L_1 dr + h2 int L_2 dr,  from r to r'

    They are polynomials in log r ("log_rho", diffusers' DEISMultistepScheduler) or in t ("tab", tAB-DEIS, which is the
    better one in few steps). Order 1 is DDIM. For a flow "tab" has y = x, r = sigma and the velocity in place of e.

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        order: 1, 2 or 3. The first rows are of lower order.
        variant: "log_rho" or "tab", what the polynomials are of. Between whole timesteps log r is linear in t.
        lower_order_final: below 15 steps, take the last two rows with orders 1 and 2.

    Raises:
        ValueError: for an order other than 1, 2 or 3, an unknown variant, a clip that is not positive, a prediction
            that cannot work at one of the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> deis(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=6, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> DEIS(Schedule.linear(), steps=5, order=3, variant="tab").table.reads
        (0, 1, 2, 1, 0)
    """

    steps: int = 10
    order: int = 3
    variant: DEISVariant = "tab"
    lower_order_final: bool = True

    @property
    def _extrapolates_velocity(self) -> bool:
        return self.prediction == "flow" and self.variant == "tab"

    def _orders(self, rising: NDArray[np.int64], alpha: Float64Array, sigma: Float64Array) -> NDArray[np.int64]:
        one_of("variant", self.variant, VARIANTS)
        orders = lower_at_the_end(rising) if self.lower_order_final and len(rising) < 15 else rising
        return of_finite_levels(orders, alpha) if self.variant == "log_rho" else orders

    def _weights(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64]
    ) -> Float64Array:
        with np.errstate(divide="ignore"):  # at pure noise and at clean data, which are no nodes
            r = sigma / alpha
            places = np.log(r) if self.variant == "log_rho" else self._times(r, sigma)
        weights = np.zeros((len(t), 4))
        for k in map(int, np.flatnonzero(orders > 1)):
            nodes = places[k - orders[k] + 1 : k + 1][::-1] - places[k]
            log = self.variant == "log_rho"
            moments = _moments_of_log(r[k], r[k + 1]) if log else self._moments_of_t(k, places, r)
            weights[k, : len(nodes)] = _through(nodes, moments)
        return weights

    def _times(self, r: Float64Array, sigma: Float64Array) -> Float64Array:
        """t of each level, between whole timesteps too, and -1 of clean data; of a flow sigma."""
        if self.prediction == "flow":
            return sigma
        known, r = self._ratios(), np.minimum(r, _MOST)
        found = np.interp(np.log(np.maximum(r, known[0])), np.log(known), np.arange(len(known), dtype=np.float64))
        found = np.where(r < known[0], r / known[0] - 1, found)
        whole: Float64Array = np.rint(found)
        return np.where(np.abs(found - whole) < 1e-6, whole, found)  # which rounding would leave beside themselves

    def _ratios(self) -> Float64Array:
        """r of every timestep, but that neither clean data nor pure noise are at an end of the logarithm."""
        alpha_bar = checked_schedule(self.schedule).alphas_cumprod
        with np.errstate(divide="ignore"):
            return np.clip(np.sqrt((1 - alpha_bar) / alpha_bar), 1 / _MOST, _MOST)

    def _moments_of_t(self, k: int, times: Float64Array, r: Float64Array) -> Float64Array:
        """int (t - t_k)^i dr over row k, i = 0, 1 and 2."""
        if self.prediction == "flow":  # r is t
            return np.array([(times[k + 1] - times[k]) ** (i + 1) / (i + 1) for i in range(3)])
        between = np.arange(np.ceil(times[k]) - 1, times[k + 1], -1.0)
        between = between[between > times[k + 1]]
        t = np.array([times[k], *between, times[k + 1]])
        r = np.array([r[k], *self._ratios()[between.astype(int)], r[k + 1]])
        moments = np.zeros(3)
        for (begin, end), (before, after) in zip(pairwise(t), pairwise(r), strict=True):
            moments += _moments_between(begin - times[k], end - times[k], before, after)
        return moments


def _moments_between(begin: float, end: float, before: float, after: float) -> Float64Array:
    """int u^i dr from u = begin to u = end, i = 0, 1 and 2; log r is linear in u, or r itself on the way to 0."""
    share = (_POINTS + 1) / 2
    u, weight = begin + (end - begin) * share, (after - before) * _WEIGHTS / 2
    if after > 0:
        log = np.log(after / before)
        weight = before * np.exp(log * share) * log * _WEIGHTS / 2
    return (u ** np.arange(3)[:, None] * weight).sum(axis=1)


def _moments_of_log(r: float, after: float) -> Float64Array:
    """int log(s / r)^i ds from s = r to s = after, i = 0, 1 and 2."""
    if after == 0:
        return r * np.array([-1.0, 1.0, -2.0])
    log = np.log(after / r)
    return np.array([after - r, after * (log - 1) + r, after * (log * log - 2 * log + 2) - 2 * r])


def _through(nodes: Float64Array, moments: Float64Array) -> Float64Array:
    """The integral of each Lagrange polynomial of these nodes, from the integrals of u^0, u^1, ..."""
    scale = np.abs(nodes).max()  # so that powers are of one size
    powers = (nodes / scale) ** np.arange(len(nodes))[:, None]
    return np.linalg.solve(powers, moments[: len(nodes)] / scale ** np.arange(len(nodes)))


deis = sampling_function(DEIS, "deis")
