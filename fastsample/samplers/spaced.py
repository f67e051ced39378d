"""The base of samplers that visit whole timesteps of a schedule: their timesteps and the noise levels there."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from numpy.typing import NDArray

from fastsample.checks import check_number
from fastsample.samplers.hints import low_start
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array, Schedule, checked_schedule
from fastsample.tables import Table
from fastsample.times.automatic import AUTO
from fastsample.times.levels import noise_levels
from fastsample.times.of_schedule import timesteps_of_schedule
from fastsample.times.timesteps import (
    SPACINGS_OF_SAMPLERS,
    Timesteps,
    check_spacing,
    one_step_from_the_noisiest,
    spaced_timesteps,
)


@dataclass(frozen=True)
class Spaced(Sampler):
    """A sampler that goes from timestep to timestep of a schedule. Subclasses add their arguments and `_rows`.

    Once made, a sampler's `steps` is the number of timesteps it visits, and `timesteps` a name or a tuple of them.

    Args:
        steps: model calls, where `timesteps` names a spacing; otherwise ignored. A single step is from timestep T - 1
            under every name but "auto" (spaced_timesteps gives the peers' lists).
        timesteps: which timesteps to visit. "auto" is round((1 - k / N) (t0 + 1)) - 1, k = 0 .. N - 1. t0 is T - 1 for
            v and x0 models, and where sigma / alpha is at most 16 there, as for Stable Diffusion; else the noisiest
            timestep whose first step makes at most 6 times as much of an error in epsilon. fastsample.spaced_timesteps
            has the spacings of other libraries by name; "ays_sd15" or "ays_sdxl": Align Your Steps; or the timesteps
            themselves, such as those of fastsample.optimal_timesteps.
    """

    schedule: Schedule
    _: KW_ONLY
    steps: int | None = None
    timesteps: Timesteps = AUTO

    def __post_init__(self) -> None:
        T = checked_schedule(self.schedule).T
        check_spacing(self.timesteps, SPACINGS_OF_SAMPLERS)
        arguments = vars(self)  # not every subclass leaves these two to the caller
        prediction = arguments.get("prediction", "epsilon")
        t = timesteps_of_schedule(self.schedule, self.timesteps, self.steps, prediction)
        if t is None:
            t = spaced_timesteps(T, self.timesteps, self.steps, original_steps=arguments.get("original_steps", 50))
            t = one_step_from_the_noisiest(T, self.timesteps, t)
        self._set(steps=len(t), timesteps=self.timesteps if isinstance(self.timesteps, str) else tuple(t.tolist()))
        self._set(table=self._rows(t, *self._levels(t)))
        self._set(_low_start=low_start(self.table, self.schedule, self.timesteps))

    def _levels(self, t: NDArray[Any]) -> tuple[Float64Array, Float64Array]:
        """(alpha, sigma), each of shape (N + 1,): the noise levels at these N timesteps and after the last row."""
        final_alpha_cumprod = vars(self).get("final_alpha_cumprod", 1.0)
        check_number("final_alpha_cumprod", final_alpha_cumprod)
        return noise_levels(self.schedule, t, final_alpha_cumprod)

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        """The table of a run through these timesteps and levels, shapes (N,), (N + 1,) and (N + 1,)."""
        raise NotImplementedError
