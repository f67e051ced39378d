"""What a run starts from: a state, a clean sample with noise up to the first row's level, or pure noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.caller import warn
from fastsample.checks import checked_shape
from fastsample.ops.noise import INITIAL, normals
from fastsample.tables import Table

Level = tuple[float, float]  # alpha, sigma


def checked_start(x: Tensor | Sequence[int]) -> torch.Size:
    """The shape that x is or has."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise TypeError(f"x must be a shape or a floating-point tensor, got {x.dtype}")
        return x.shape if x.ndim and x.numel() else checked_shape("x", x.shape)
    if not isinstance(x, torch.Size | tuple | list) and hasattr(x, "__array__"):
        raise TypeError(f"x must be a shape or a tensor, got {type(x).__name__}: torch.from_numpy makes one")
    return checked_shape("x", x)


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


def noise_level(table: Table, row: int) -> Level:
    """(alpha, sigma) of the state before this row.

    Raises:
        ValueError: for a table that does not say.
    """
    if table.alpha is None or table.sigma is None:
        raise ValueError("strength needs a table with noise levels: Table(..., alpha=, sigma=)")
    return float(table.alpha[row]), float(table.sigma[row])


def at_level(x0: Tensor, level: Level, keys: Tensor, backend: str) -> Tensor:
    """alpha x0 + sigma z of clean samples, in place."""
    alpha, sigma = level
    z = normals(x0.shape, keys, 0, INITIAL, x0.device, backend).to(x0.dtype)
    return x0.mul_(alpha).add_(z.mul_(sigma))
