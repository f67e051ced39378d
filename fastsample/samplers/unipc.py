"""UniPC (Zhao et al. 2023): a predictor whose state the next row corrects, both in the one pass of that row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import one_of
from fastsample.samplers.multistep import Multistep, lower_at_the_end, of_finite_levels, widths
from fastsample.samplers.sampling_function import sampling_function
from fastsample.schedule import Float64Array
from fastsample.tables import HISTORY

UniPCVariant = Literal["bh1", "bh2"]
VARIANTS: tuple[UniPCVariant, ...] = get_args(UniPCVariant)


class Parts(NamedTuple):
    """What the columns of rows are made of.

    Attributes:
        a: what x is multiplied by, (N,).
        predicted: of the row's x0 and of the entries of the three rows before, (N, 4), without any correction.
        moved: by what the state after the row is corrected: of the next row's x0 and of the entries before, (N, 4).
    """

    a: Float64Array
    predicted: Float64Array
    moved: Float64Array


@dataclass(frozen=True, kw_only=True)
class UniPC(Multistep):
    """Samples with UniPC (Zhao et al. 2023), of order 1 to 3, one more with its corrector: the best from 6 calls on.

    From noise level (alpha, sigma) to (alpha', sigma'), with w the width of the row in lambda = log(alpha / sigma),
    m_j the x0 of j rows ago, r_j = (lambda_j - lambda) / w, D_j = (m_j - m_0) / r_j, and B = -w ("bh1") or e^-w - 1
    ("bh2"):

        predictor: x' = sigma'/sigma x - alpha' (e^-w - 1) m_0 - alpha' B sum_j p_j D_j,  j = 1 .. order - 1
        corrector: x  = the same, with c_j in place of p_j, and - alpha' B c_order (x0 - m_0) beside it

    where x0 is the model's at x', and p and c solve a small system for each row. The corrector costs no model call and
    no memory: x and the corrected x differ by a combination of x0 and of the m_j, which is added where the next row is
    taken. These are diffusers' UniPCMultistepScheduler with predict_x0.

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        order: 1, 2 or 3; 2 is best under guidance, 3 without. The first rows are of lower order.
        variant: "bh1", better in up to 10 calls, or "bh2".
        corrector: whether to correct.
        final_alpha_cumprod: ... At 1 the last row is of order 1.
        lower_order_final: take the last two rows with orders 2 and 1.

    Raises:
        ValueError: for an order other than 1, 2 or 3, an unknown variant, a clip that is not positive, a prediction
            that cannot work at one of the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> unipc(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=8, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> UniPC(Schedule.linear(), steps=6, order=3).table.reads
        (0, 1, 2, 3, 3, 0)
    """

    steps: int = 10
    variant: UniPCVariant = "bh2"
    corrector: bool = True
    lower_order_final: bool = True

    def _orders(self, rising: NDArray[np.int64], alpha: Float64Array, sigma: Float64Array) -> NDArray[np.int64]:
        one_of("variant", self.variant, VARIANTS)
        orders = of_finite_levels(lower_at_the_end(rising) if self.lower_order_final else rising, alpha)
        if sigma[-1] == 0:  # at an infinite width
            orders[-1] = 1
        return orders

    def _columns(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64], start: int
    ) -> dict[str, Any]:
        parts = self._parts(alpha, sigma, orders, start)
        shares = parts.predicted.copy()
        shares[1:] += parts.a[1:, None] * parts.moved[:-1]
        return {"a": parts.a, "b": shares[:, 0], **dict(zip(HISTORY, shares[:, 1:].T, strict=True))}

    def _parts(self, alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64], start: int) -> Parts:
        w = widths(alpha, sigma)
        b_of_w = -w if self.variant == "bh1" else np.expm1(-w)
        predicted, moved = np.zeros((2, len(w), 1 + len(HISTORY)))
        predicted[:, 0] = -alpha[1:] * np.expm1(-w)
        for k, order in enumerate(orders):
            if order > 1 and w[k] != 0:
                r, weights = _predictor(k, order, w, b_of_w)
                predicted[k, :order] -= alpha[k + 1] * b_of_w[k] * _of_differences(weights / r)
            last, infinite = k + 1 == len(w), self.variant == "bh1" and np.isinf(w[k])
            if k >= start and not last and self._corrects(k) and w[k] != 0 and not infinite:
                moved[k] = self._correction(k, order, alpha, w, b_of_w)
        return Parts(sigma[1:] / sigma[:-1], predicted, moved)

    def _corrects(self, k: int) -> bool:
        """Whether the state after row k is corrected."""
        return self.corrector

    def _correction(
        self, k: int, order: int, alpha: Float64Array, w: Float64Array, b_of_w: Float64Array
    ) -> Float64Array:
        """What the state after row k is to be moved by, of the next row's x0 and of the entries before that, (4,)."""
        r, predicted = _predictor(k, order, w, b_of_w)
        corrected = np.array([0.5]) if order == 1 else _solved(np.append(r, 1.0), w[k], b_of_w[k])
        moved = np.zeros(1 + len(HISTORY))
        moved[0], moved[1] = -corrected[-1], corrected[-1]
        moved[1 : 1 + order] += _of_differences((predicted - corrected[:-1]) / r)
        return alpha[k + 1] * b_of_w[k] * moved


def _predictor(k: int, order: int, w: Float64Array, b_of_w: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(r_j, p_j) of row k, j = 1 .. order - 1."""
    r = np.array([-w[k - j : k].sum() / w[k] for j in range(1, order)])
    return r, np.array([0.5]) if order == 2 else _solved(r, w[k], b_of_w[k])


def _of_differences(weights: Float64Array) -> Float64Array:
    """Of m_0, m_1, ... what a weighted sum of the differences m_j - m_0 has, j = 1, 2, ..."""
    return np.array([-weights.sum(), *weights])


def _solved(r: Float64Array, w: float, b_of_w: float) -> Float64Array:
    """The weights that sum r_j^(i - 1) weight_j = i! phi_(i + 1)(-w) (-w) / B, i = 1, 2, ..., asks for."""
    sides = []
    phi = np.expm1(-w) / -w - 1  # -w phi_2(-w)
    for i in range(1, len(r) + 1):
        sides.append(phi * math.factorial(i) / b_of_w)
        phi = phi / -w - 1 / math.factorial(i + 1)
    return np.linalg.solve(r ** np.arange(len(r))[:, None], sides) if sides else np.empty(0)


unipc = sampling_function(UniPC, "unipc")
