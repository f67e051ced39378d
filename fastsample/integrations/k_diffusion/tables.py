"""Each method through given sigmas as a table: x = x0 + sigma z, and the model's output is x0.

A table of the same sigmas and options is made once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastsample.schedule import Float64Array
from fastsample.tables import HISTORY, Table

Sigmas = tuple[float, ...]  # before each step and after the last
_MOST = 64  # methods that are kept


class Method(NamedTuple):
    """A method through given sigmas.

    Attributes:
        table: its rows.
        sigma: of each row what the model is given.
        first_rows: of each step the row that callbacks see; those up to the next step's belong to it too.
        draws: of each row whether noise is asked for, which it may multiply by 0.
        slope_first: whether (x - x0) / sigma is worked out before the callback, as k-diffusion does in some methods:
            what a callback then adds to x stays as it is.
        churn: what adds noise before a row, x' = x + s z, where its s is not 0.
    """

    table: Table
    sigma: Sigmas
    first_rows: tuple[int, ...]
    draws: tuple[bool, ...]
    slope_first: bool = False
    churn: Table | None = None


class Churn(NamedTuple):
    """Noise that is added before steps from sigmas in [low, high] (Karras et al. 2022, algorithm 2).

    Attributes:
        amount: S_churn, spread over all steps.
        low, high: S_tmin and S_tmax.
        scale: S_noise.
    """

    amount: float
    low: float
    high: float
    scale: float

    def levels(self, sigma: Float64Array) -> Float64Array:
        """sigma (1 + gamma) of the level of each step, (N,)."""
        gamma = min(self.amount / len(sigma), math.sqrt(2) - 1)
        return np.where((self.low <= sigma) & (sigma <= self.high), sigma * (1 + gamma), sigma)


@lru_cache(_MOST)
def euler(sigmas: Sigmas, churn: Churn) -> Method:
    """x' = x + (sigma' - sigma) (x - x0) / sigma."""
    now, then = _levels(sigmas)
    churned = churn.levels(now)
    a = then / churned
    return _method(
        churned, a=a, b=1 - a, slope_first=True, churn=_churn_table(churned, now, churn.scale, np.arange(len(now)))
    )


@lru_cache(_MOST)
def heun(sigmas: Sigmas, churn: Churn) -> Method:
    """Euler's row, and where it does not end without noise one that takes the mean of the slopes at both ends.

    The second row starts from x2 = x + (sigma' - sigma) h1, h1 the slope of the first, and so makes
    x' = x2 + (sigma' - sigma) / 2 ((x2 - x0) / sigma' - h1).
    """
    now, then = _levels(sigmas)
    churned = churn.levels(now)
    corrected = then > 0
    first = np.arange(len(now)) + np.cumsum(corrected) - corrected
    second, half = first[corrected] + 1, (then - churned)[corrected] / 2
    sigma = np.empty(len(now) + int(corrected.sum()))
    a, c1 = np.empty_like(sigma), np.zeros_like(sigma)
    sigma[first], sigma[second] = churned, then[corrected]
    a[first], a[second], c1[second] = then / churned, 1 + half / then[corrected], -half
    return _method(
        sigma,
        a=a,
        b=1 - a,
        c1=c1,
        hx=1 / sigma,
        h0=-1 / sigma,
        first_rows=first,
        slope_first=True,
        churn=_churn_table(churned, now, churn.scale, first, rows=len(sigma)),
    )


@lru_cache(_MOST)
def ancestral(sigmas: Sigmas, eta: float, s_noise: float, draws_at_zero: bool) -> Method:
    """Euler's step down to less noise than sigma' has, and new noise for the rest.

    up = min(sigma', eta sigma' sqrt(1 - sigma'^2 / sigma^2)), down = sqrt(sigma'^2 - up^2)
    x' = x + (down - sigma) (x - x0) / sigma + s_noise up z
    """
    now, then = _levels(sigmas)
    up = np.minimum(then, eta * then * np.sqrt(1 - (then / now) ** 2))
    a = np.sqrt((then - up) * (then + up)) / now
    return _method(now, a=a, b=1 - a, s=s_noise * up, draws=(then > 0) & (eta > 0 or draws_at_zero))


@lru_cache(_MOST)
def dpmpp_2m(sigmas: Sigmas, eta: float, s_noise: float, solver_type: str) -> Method:
    """DPM-Solver++ (2M) and its SDE, with w = log(sigma / sigma'), w1 that of the last row, and E = 1 - e^-(1 + eta) w.

    x' = sigma'/sigma e^-(eta w) x + E x0 + C w / w1 (x0 - h1) + s_noise sigma' sqrt(1 - e^-2(eta w)) z

    C is E / 2 for "midpoint" and 1 - E / ((1 + eta) w) for "heun". The first row and one to sigma' = 0 are without h1.
    """
    now, then = _levels(sigmas)
    with np.errstate(divide="ignore"):
        w = np.log(now) - np.log(then)
    e = -np.expm1(-(1 + eta) * w)
    two = np.isfinite(w) & (np.arange(len(w)) > 0)
    k = np.flatnonzero(two)
    c = e[k] / 2 if solver_type == "midpoint" else 1 - e[k] / ((1 + eta) * w[k])
    of_last = np.zeros_like(w)
    of_last[k] = c * w[k] / w[k - 1]
    noise = np.sqrt(-np.expm1(-2 * eta * w)) if eta else 0.0
    kept = then / now * np.exp(-eta * w) if eta else then / now
    return _method(now, a=kept, b=e + of_last, c1=-of_last, s=s_noise * then * noise, draws=(then > 0) & (eta > 0))


@lru_cache(_MOST)
def lcm(sigmas: Sigmas) -> Method:
    """x' = x0 + sigma' z."""
    now, then = _levels(sigmas)
    return _method(now, b=1.0, s=then, draws=then > 0)


@lru_cache(_MOST)
def ipndm(sigmas: Sigmas, max_order: int) -> Method:
    """x' = x + (sigma' - sigma) (W0 (x - x0) / sigma + W1 h1 + W2 h2 + W3 h3), h the slopes of the last rows.

    W are Adams and Bashforth's, of as many slopes as there are, at most max_order. A row to sigma' = 0 is x' = x0.
    """
    now, then = _levels(sigmas)
    weights = np.zeros((len(now), 4))
    for k in range(len(now)):
        order = 1 if then[k] == 0 else min(max_order, k + 1)
        weights[k, :order] = adams_bashforth(order)
    weights *= (then - now)[:, None]
    of_slope, *earlier = weights.T
    of_x0 = -of_slope / now
    columns: dict[str, Any] = dict(zip(HISTORY, earlier, strict=True))
    return _method(now, a=1 - of_x0, b=of_x0, hx=1 / now, h0=-1 / now, **columns)


def adams_bashforth(order: int) -> Float64Array:
    """What integrates the polynomial through values at 0, -1, -2, ... from 0 to 1.

    Example:
        >>> (adams_bashforth(3) * 12).round(9).tolist()
        [23.0, -16.0, 5.0]
    """
    powers = np.arange(order)
    solved = np.linalg.solve((-powers.astype(np.float64)) ** powers[:, None], 1 / (powers + 1))
    return solved.astype(np.float64)


def _levels(sigmas: Sigmas) -> tuple[Float64Array, Float64Array]:
    levels = np.array(sigmas)
    return levels[:-1], levels[1:]


def _method(
    sigma: Float64Array,
    *,
    first_rows: Any = None,
    draws: Any = False,
    slope_first: bool = False,
    churn: Table | None = None,
    **columns: Any,
) -> Method:
    table = Table(sigma.astype(np.float32), q=1.0, **columns)
    rows = range(len(sigma)) if first_rows is None else first_rows.tolist()
    drawn = np.broadcast_to(draws, sigma.shape).tolist()
    return Method(table, tuple(sigma.tolist()), tuple(rows), tuple(drawn), slope_first, churn)


def _churn_table(
    churned: Float64Array, sigma: Float64Array, scale: float, first_rows: Any, rows: int | None = None
) -> Table | None:
    """What brings steps from sigma up to their churned levels, a row for each of the method's."""
    if (churned == sigma).all():
        return None
    s = np.zeros(len(sigma) if rows is None else rows)
    s[first_rows] = scale * np.sqrt((churned - sigma) * (churned + sigma))
    return Table(np.zeros_like(s, np.int64), a=1.0, s=s)
