"""The constants of a table's posteriors, computed from its columns."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.tracing import outside
from fastsample.tables import Table


class PosteriorRows(NamedTuple):
    """The constants of a table's posteriors.

    Attributes:
        constants, slopes: of each row: log variance = constant + slope v.
        refusals: of each row the reason that it has no posterior; empty where it has one.
        any_learned: whether any slope is not 0.
        first_to_check: the row to check where the host does not know which rows are visited: a row without a posterior
            if there is any, else one with a learned variance if there is any.
        noise_free: the same rows without noise.
    """

    constants: tuple[float, ...]
    slopes: tuple[float, ...]
    refusals: tuple[str, ...]
    any_learned: bool
    first_to_check: int
    noise_free: Table


def rows_of(table: Table) -> PosteriorRows:
    """The constants of this table's posteriors, computed once."""
    return table.derived("posterior", _posterior_rows)


def _posterior_rows(table: Table) -> PosteriorRows:
    constant = 2 * (table.g0 + np.log(np.abs(table.s), out=np.zeros(len(table)), where=table.s != 0))
    none = (table.s == 0) & (table.g0 == 0) & (table.g1 == 0)
    recalls = np.array(table.reads) > 0
    reasons = np.where(
        none, "is deterministic: it has no variance", np.where(recalls, "reads entries of earlier rows", "")
    )
    slopes = 2 * table.g1
    return PosteriorRows(
        tuple(constant.tolist()),
        tuple(slopes.tolist()),
        tuple(reasons.tolist()),
        any(table.learned),
        first_to_check=int(np.argmax(2 * (none | recalls) + (slopes != 0))),
        noise_free=table.replace(s=0.0, g0=0.0, g1=0.0),
    )


def variance_of(rows: Tensor, table: Table, x: Tensor) -> tuple[Tensor, Tensor]:
    """(constants, slopes) of these rows, beside x and in its dtype; NaN for rows that do not exist."""

    def make(table: Table) -> Tensor:
        with outside():
            numbers = torch.tensor(rows_of(table)[:2], dtype=torch.float64, device="cpu")
            return numbers.to(x.device, x.dtype)

    both = table.derived(("posterior", x.device, x.dtype), make)
    visited = rows.to(x.device)
    constant, slope = both[:, visited % len(table)].unbind()
    if not rows.is_cpu:  # checked_rows does not read rows that lie on a GPU
        constant = constant.masked_fill((visited < -len(table)) | (visited >= len(table)), math.nan)
    return constant, slope
