"""An oracle of solvers that extrapolate epsilon: float64, in sigma space, with integrals by a fine grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.chains import toy_model
from support.diffusers_runs import start


class Levels(NamedTuple):
    """The times of a run, and r = sigma / alpha there and after its last row."""

    t: np.ndarray
    r: np.ndarray


# (levels, rows, k): the weights of the epsilon of these rows in row k, the first of which is k.
Weights = Callable[[Levels, Sequence[int], int], np.ndarray]


def integrals(
    nodes: Sequence[float],
    variable: Callable[[np.ndarray], np.ndarray],
    start: float,
    end: float,
    spaced: Callable[..., np.ndarray],
) -> np.ndarray:
    """int L_j(variable(r)) dr from start to end, of the Lagrange polynomials of these nodes."""
    r = spaced(start, end, 200_001)
    u, found = variable(r), []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        values = np.prod([(u - other) / (node - other) for other in others], axis=0) if others else np.ones_like(u)
        found.append(float(np.trapezoid(values, r)))
    return np.array(found)


def run(sampler: Any, weights: Weights, order: int, *, lowers: bool) -> Tensor:
    """y = x / alpha through the levels of a sampler's table, for a model of epsilon."""
    table, x = sampler.table, start().double()
    levels = Levels(table.t.astype(np.float64), table.sigma / table.alpha)
    y, earlier = x / table.alpha[0], []
    for k, t in enumerate(table.t.tolist()):
        earlier.insert(0, toy_model(y * table.alpha[k], torch.full((len(x),), t)))
        count = min(order, k + 1, len(table) - k if lowers else order)
        of_rows = weights(levels, range(k, k - count, -1), k)
        y = y + sum(float(w) * epsilon for w, epsilon in zip(of_rows, earlier, strict=False))
    return y * table.alpha[-1]
