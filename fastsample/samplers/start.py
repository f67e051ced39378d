"""Where a run starts: from which x, and at which row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.noise import checked_shape
from fastsample.samplers.limits import check_number
from fastsample.tables import Table

if TYPE_CHECKING:
    from fastsample.samplers.sampler import Sampler


def checked_start(x: Tensor | Sequence[int]) -> torch.Size:
    """The shape that x is or has."""
    if not isinstance(x, Tensor):
        if hasattr(x, "__array__"):
            raise TypeError(f"x must be a shape or a tensor, got {type(x).__name__}: torch.from_numpy makes one")
        return checked_shape("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be a shape or a floating-point tensor, got {x.dtype}")
    return checked_shape("x", x.shape)


def first_row(sampler: Sampler, has_x: bool, strength: float | None, start_step: int) -> int:
    """The row that a run starts at; has_x tells whether x is a tensor."""
    rows = len(sampler.table)
    if strength is None:
        if not isinstance(start_step, int | np.integer):
            raise TypeError(f"start_step must be an int, got {start_step!r}")
        if not 0 <= start_step < rows:
            raise ValueError(f"start_step must lie in [0, {rows}), got {start_step}")
        if start_step and not has_x:
            raise ValueError("start_step needs the state before that row as x, not a shape")
        return int(start_step)
    if start_step:
        raise ValueError("give strength= (x is clean) or start_step= (x is noisy already), not both")
    if not has_x:
        raise ValueError("strength needs a clean sample as x, not a shape")
    check_number("strength", strength)
    if not 0 < strength <= 1 or int(rows * strength) == 0:
        raise ValueError(f"strength must lie in (0, 1] and leave at least one of {rows} rows, got {strength}")
    start = rows - int(rows * strength)
    try:
        sampler.table_from(start)
    except ValueError:
        return start - 1  # between the two rows of a Heun step nothing can start
    return start


def noise_level(table: Table, row: int) -> tuple[float, float]:
    """(alpha, sigma) of the state before this row.

    Raises:
        ValueError: for a table that does not say.
    """
    if table.alpha is None or table.sigma is None:
        raise ValueError("strength needs a table with noise levels: Table(..., alpha=, sigma=)")
    return float(table.alpha[row]), float(table.sigma[row])
