"""The base of solvers through times and noise levels that are given, not worked out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.diffusers.described import OfScheduler
from fastsample.samplers.diffusers.reading import Reading
from fastsample.samplers.solver import Solver
from fastsample.schedule import Float64Array


class Levels(NamedTuple):
    """Times, N of them, and noise levels there and after the last step, N + 1."""

    t: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class GivenLevels(OfScheduler, Solver):
    """A solver through `visited`, in place of a schedule, timesteps, steps, shift and final_alpha_cumprod.

    Args:
        quiet: whether nothing is said of rows that multiply the model's error, where the choice was another's.
    """

    visited: Levels
    quiet: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(timesteps=self.visited.t, _low_start=None)

    def _levels(self) -> tuple[NDArray[Any], Float64Array, Float64Array]:
        t, alpha, sigma = map(np.array, self.visited)
        return t, alpha, sigma


def of_ratios(t: NDArray[Any], ratio: Float64Array) -> Levels:
    """The levels of a diffusion with these sigma / alpha."""
    alpha = 1 / np.sqrt(ratio**2 + 1)
    return _levels(t, alpha, ratio * alpha)


def of_flow(t: NDArray[Any], sigma: Float64Array) -> Levels:
    """The levels of a flow with these sigmas."""
    return _levels(t, 1 - sigma, sigma)


def sigmas_of(reading: Reading) -> Float64Array:
    """The scheduler's sigmas in its steps and after the last, (N + 1,)."""
    sigmas = reading.array("sigmas")[: len(reading.t) + 1]
    if not np.isfinite(sigmas).all() or (sigmas < 0).any():
        raise ValueError(f"the sigmas of this {reading.name} are not all finite: {sigmas.tolist()}")
    return sigmas


def _levels(t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Levels:
    return Levels(tuple(t.tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))
