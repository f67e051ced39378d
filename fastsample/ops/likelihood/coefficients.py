"""The coefficients of the likelihood's terms, computed from a table's columns if its rows are posteriors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.tracing import constant_when_traced, outside
from fastsample.schedule import Float64Array
from fastsample.tables import Table

COLUMNS = ("p", "q", "limit", "a", "b", "weight", "constant", "slope", "data")
_ROW = 16  # floats of a row of coefficients as kernels read it, 64 bytes like a table's


@constant_when_traced
def coefficients_of(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients of each row's terms, shape (rows, 16), computed once per dtype and device."""

    def make(table: Table) -> Tensor:
        with outside():
            return torch.from_numpy(_columns(table)).to(device, dtype)

    return table.derived(("likelihood", dtype, device), make)


def _columns(table: Table) -> Float64Array:
    alpha, sigma = levels_of(table)
    table = with_one_limit(table)
    if table.thresholded or table.box is not None:
        how = "thresholds x0 dynamically" if table.thresholded else "limits each element of x0 by bounds of its own"
        raise ValueError(f"table {how}: a likelihood needs clip=None, a number or a pair (-c, c)")
    with np.errstate(divide="ignore", invalid="ignore"):
        shrink = alpha[:-1] / alpha[1:]
        added = sigma[:-1] ** 2 - (shrink * sigma[1:]) ** 2  # the variance of x given x'
        share = added / sigma[:-1] ** 2
        a, b, variance = shrink * (sigma[1:] / sigma[:-1]) ** 2, alpha[1:] * share, share * sigma[1:] ** 2
        to_data = sigma[1:] == 0
        log_variance = 2 * (table.g0 + np.log(np.abs(table.s), out=np.zeros(len(table)), where=table.s != 0))
        weight = np.where(to_data, 0.0, b**2 / variance)
        constant = np.where(to_data, log_variance, log_variance - np.log(variance))
    for bad, why in (
        (~np.isclose(table.a, a, rtol=1e-6, atol=1e-9), "has another mean"),
        (~np.isclose(table.b, b, rtol=1e-6, atol=1e-9), "has another mean"),
        ((table.d != 0) | (np.array(table.reads) > 0), "has another mean"),
        (~to_data & (table.s == 0), "adds no noise"),
        ((table.s == 0) & (table.g0 == 0) & (table.g1 == 0), "has no variance"),
    ):
        if bad.any():
            raise ValueError(f"row {bad.argmax()} {why}: a likelihood needs rows of DDPM, posteriors q(x' | x, x0)")
    columns = dict(a=a, b=b, weight=weight, constant=constant, slope=2 * table.g1, data=to_data)
    values = [columns[name] if name in columns else getattr(table, name) for name in COLUMNS]
    return np.pad(np.stack(values, axis=1).astype(np.float64), ((0, 0), (0, _ROW - len(values))))


def with_one_limit(table: Table) -> Table:
    """The table, with bounds that are -c and c for every element as the number c."""
    if table.box is None:
        return table
    low, high = table.box
    largest = float(high.max())
    if largest <= 0 or (high != largest).any() or (low != -largest).any():
        return table
    limit = np.where(np.isinf(table.limit), np.inf, largest)
    return table.replace(box=None, limit=limit)  # type: ignore[arg-type]  # that of a table without bounds


def levels_of(table: Table) -> tuple[Float64Array, Float64Array]:
    if table.alpha is None or table.sigma is None:
        raise ValueError("table has no noise levels (alpha, sigma): a likelihood needs those of its forward process")
    return table.alpha, table.sigma
