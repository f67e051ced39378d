"""The base of solvers that extrapolate epsilon through earlier rows: a weight for each of them makes a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.multistep import Multistep
from fastsample.schedule import Float64Array
from fastsample.tables import HISTORY


@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    """A solver of dy/dr = epsilon, y = x / alpha, r = sigma / alpha, or of a flow's dx/dsigma = v, its velocity z - x0.

        y' = y + W0 epsilon + W1 h1 + W2 h2 + W3 h3

    h1, h2 and h3 are epsilon (or v) of the last three rows. Subclasses add their arguments and `_weights`; epsilon is
    that of x and the limited x0.
    """

    @property
    def _extrapolates_velocity(self) -> bool:
        """Whether v in place of epsilon is what rows remember."""
        return self.prediction == "flow"

    def _weights(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64]
    ) -> Float64Array:
        """W of each row for the entries of this row and of those before, (N, 4); that of this row is not looked at,
        since together they are r' - r."""
        raise NotImplementedError

    def _columns(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64], start: int
    ) -> dict[str, Any]:
        scale = np.ones_like(alpha) if self._extrapolates_velocity else alpha
        earlier = scale[1:, None] * self._weights(t, alpha, sigma, orders)[:, 1:] + 0.0  # which has no -0
        kept = sigma[1:] / sigma[:-1]
        hx, h0 = 1 / sigma[:-1], -scale[:-1] / sigma[:-1]
        # Euler's row, which has a limit at pure noise, and what the others make of epsilon beyond it.
        beyond = -earlier.sum(axis=1)
        columns = {"a": kept + beyond * hx, "b": alpha[1:] - alpha[:-1] * kept + beyond * h0, "hx": hx, "h0": h0}
        return columns | dict(zip(HISTORY, earlier.T, strict=True))
