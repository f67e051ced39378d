"""Where a run starts: from which x, at which row, and whether the two agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsample.caller import warn
from fastsample.checks import check_number, checked_shape, integer
from fastsample.tables import Table

if TYPE_CHECKING:
    from fastsample.samplers.sampler import Sampler


def checked_start(x: Tensor | Sequence[int]) -> torch.Size:
    """The shape that x is or has."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise TypeError(f"x must be a shape or a floating-point tensor, got {x.dtype}")
        return x.shape if x.ndim and x.numel() else checked_shape("x", x.shape)
    if not isinstance(x, torch.Size | tuple | list) and hasattr(x, "__array__"):
        raise TypeError(f"x must be a shape or a tensor, got {type(x).__name__}: torch.from_numpy makes one")
    return checked_shape("x", x)


def start_of(sampler: Sampler, has_x: bool, strength: float | None, start_step: int) -> tuple[Table, int]:
    """(the table, its row that the run starts at); has_x tells whether x is a tensor.

    Warns where the noise that is drawn for want of x is far from the level of the first row.
    """
    rows = len(sampler.table)
    if strength is None:
        start_step = integer("start_step", start_step)
        if not 0 <= start_step < rows:
            raise ValueError(f"start_step must lie in [0, {rows}), got {start_step}")
        if start_step and not has_x:
            raise ValueError("start_step needs the state before that row as x, not a shape")
        if not has_x:
            warn_of_far_noise(sampler.table)
        return (sampler.table_from(int(start_step)) if start_step else sampler.table), int(start_step)
    if start_step:
        raise ValueError("give strength= (x is clean) or start_step= (x is noisy already), not both")
    if not has_x:
        raise ValueError("strength needs a clean sample as x, not a shape")
    check_number("strength", strength)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    return sampler._part(float(strength))


def steps_left_out(steps: int, strength: float, *, kept_part: bool = False, unit: str = "rows") -> int:
    """How many of the steps a run from a clean sample leaves out at the start: steps - floor(steps strength).

    `kept_part` runs the step that only a part of is asked for too, floor(steps - steps strength), as diffusers'
    pipelines of flow models (Stable Diffusion 3, Flux) do. Both are in floating point, as there.

    Raises:
        ValueError: where no step is left.
    """
    left_out = int(steps - steps * strength) if kept_part else steps - int(steps * strength)
    if left_out == steps:
        raise ValueError(f"strength must lie in (0, 1] and leave at least one of {steps} {unit}, got {strength}")
    return left_out


def last_rows(sampler: Sampler, strength: float) -> tuple[Table, int]:
    """(the table, its first row) of a run of the last `strength` of the rows, or one more where that row can start."""
    row = steps_left_out(len(sampler.table), strength)
    try:
        return (sampler.table_from(row) if row else sampler.table), row
    except ValueError:
        return sampler.table_from(row - 1), row - 1


def warn_of_far_noise(table: Table) -> None:
    """Warns where x_T, drawn as init_noise_sigma z, is no state alpha x0 + sigma z of the first row's level.

    Of x0 it lacks all, which goes unnoticed only as long as a state is mostly noise: sigma >= alpha. No spacing of two
    steps or more fails that on a usual schedule of 1000 timesteps: the cleanest start, "leading" with two steps on the
    cosine schedule, is at alpha bar 0.49. There sigma lies in [0.7, 1] (a flow's in [0.5, 1]), at most a factor of 2
    from the 1 that is drawn.
    """
    if table.alpha is None or table.sigma is None:
        return
    alpha, sigma, drawn = float(table.alpha[0]), float(table.sigma[0]), table.init_noise_sigma
    level = (
        f"the first row (t = {table.times[0]:g}) takes a state at the level alpha = {alpha:.3g}, sigma = {sigma:.3g}"
    )
    if sigma < alpha:
        warn(
            f"x_T is drawn as pure noise, but {level}, which is more sample than noise: begin with a noisier timestep, "
            "or give as x a clean sample with strength=, or a state at that level (with start_step= of a longer run)"
        )
    elif not sigma / 2 <= drawn <= 2 * sigma:
        warn(f"x_T is drawn with the deviation {drawn:.3g}, but {level}: give the table init_noise_sigma={sigma:.3g}")


def noise_level(table: Table, row: int) -> tuple[float, float]:
    """(alpha, sigma) of the state before this row.

    Raises:
        ValueError: for a table that does not say.
    """
    if table.alpha is None or table.sigma is None:
        raise ValueError("strength needs a table with noise levels: Table(..., alpha=, sigma=)")
    return float(table.alpha[row]), float(table.sigma[row])
